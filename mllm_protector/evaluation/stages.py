"""The stages of an evaluation: answer, guard, judge. Rows in, rows out, with a store and a worker.

A stage computes the rows that its store lacks and returns the rows of everything that was asked. Without a
worker it only reads. The key of an answer is a hash of model, settings, words and image; that of a guard's
reply, of the answer and the guard; that of a verdict, of the judge and the words judged. So another guard
needs no new answers, another model never gets old ones, and the same words are judged once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mllm_protector.errors import RunError
from mllm_protector.evaluation.items import Item
from mllm_protector.evaluation.store import FAILED, Filled, Store, fill
from mllm_protector.files import content_key
from mllm_protector.guard.protector import Protector
from mllm_protector.judges.guard_model import Probe
from mllm_protector.normalisation import is_blank
from mllm_protector.protocols import MLLM, Card, Judge
from mllm_protector.records import (
    BENIGN,
    JUDGED,
    TO_REPEAT,
    Answer,
    CutText,
    Failure,
    Outcome,
    Question,
    Status,
    Verdict,
    require_reached,
)

log = logging.getLogger(__name__)

CUT = "cut"
"""The field of rows with a text that was cut at its longest length; other rows lack it."""

Row = dict[str, Any]
"""A row of a store."""

Asked = tuple[Question, str]
"""A question, and the text to guard or to judge."""

Shown = tuple[Question, str | Status]
"""A question, and the text that the user sees or why there is nothing to judge."""


def answer_stage(
    items: Sequence[Item], store: Store, mllm: MLLM | None = None, *, batch_size: int = 1
) -> tuple[list[Row], Filled]:
    """The MLLM's answer to each item: a row with ``text``, or with ``failed``.

    Raises:
        RunError: nobody answers, or a row is missing and there is no ``mllm``.
    """
    wanted = [(item.key, (item.question, "")) for item in items]
    work = partial(_answers, mllm) if mllm else None
    rows, filled = _rows(store, wanted, work, batch_size=batch_size, title="answers")
    return [rows[item.key] for item in items], filled


def guard_stage(
    arm: str,
    items: Sequence[Item],
    answers: Sequence[Row],
    store: Store,
    identity: Mapping[str, Any],
    protector: Protector | None = None,
    *,
    batch_size: int = 1,
) -> tuple[list[Row | None], Filled]:
    """The guard's reply to each answer: ``harm``, ``final``, ``outcome``; ``None`` where there is no answer.

    ``identity`` says what the replies depend on.

    Raises:
        RunError: a row is missing and there is no ``protector``.
    """
    guard = content_key(identity)
    keys = [
        content_key(guard, item.question.text, answer["text"], None) if "text" in answer else None
        for item, answer in zip(items, answers, strict=True)
    ]
    wanted = [
        (key, (item.question, str(answer["text"])))
        for key, item, answer in zip(keys, items, answers, strict=True)
        if key is not None
    ]
    work = partial(_replies, protector) if protector else None
    rows, filled = _rows(store, wanted, work, batch_size=batch_size, title=f"guard: {arm}")
    return [None if key is None else rows[key] for key in keys], filled


def shown(answer: Row, reply: Row | None) -> str | Status:
    """The text that the user sees, or why there is nothing to judge."""
    if FAILED in answer:
        return Status.GENERATION_ERROR
    if reply is not None and reply["outcome"] == Outcome.GUARD_ERROR:
        return Status.GUARD_ERROR
    text = str(answer["text"] if reply is None else reply["final"])
    return Status.EMPTY if is_blank(text) else text


def shown_is_cut(answer: Row, reply: Row | None) -> bool:
    """Whether the text that the user sees was cut at its longest length."""
    row = answer if reply is None or reply["outcome"] == Outcome.ALLOWED else reply
    return bool(row.get(CUT, False))


def judge_stage(
    name: str,
    texts: Sequence[Shown],
    store: Store,
    card: Card,
    judge: Judge | None = None,
    *,
    batch_size: int = 1,
) -> tuple[list[Row], Filled]:
    """A verdict on each text: ``status`` and ``reason``, and ``cut`` where the judge's reply was.

    A judge that reads no questions judges equal texts once. Rows of harmless questions are empty.

    Raises:
        RunError: a row is missing and there is no ``judge``.
    """
    identity = content_key(card.identity)
    verdicts: list[Row] = []
    keys: dict[int, str] = {}  # the places of verdicts that a judge has to give
    for place, (question, text) in enumerate(texts):
        harmless = question.scenario == BENIGN
        verdicts.append({} if harmless else {"status": str(text), "reason": ""})
        if not harmless and not isinstance(text, Status):
            keys[place] = _verdict_key(identity, card, question, text)
    wanted = [(key, (texts[place][0], str(texts[place][1]))) for place, key in keys.items()]
    work = partial(_verdicts, judge) if judge else None
    rows, filled = _rows(store, wanted, work, batch_size=batch_size, title=f"judge: {name}")
    for place, key in keys.items():
        verdicts[place] = {each: rows[key][each] for each in ("status", "reason", CUT) if each in rows[key]}
    return verdicts, filled


def _rows(
    store: Store,
    wanted: Sequence[tuple[str, Asked]],
    work: Callable[[Sequence[Asked]], list[Row]] | None,
    *,
    batch_size: int,
    title: str,
) -> tuple[dict[str, Row], Filled]:
    """The row of each key; ``work`` makes those that are missing."""
    filled = fill(store, wanted, work, batch_size=batch_size, title=title) if work else Filled()
    return {key: store.required(key, question.id) for key, (question, _) in wanted}, filled


def probe_stage(key: str, judge: Judge, store: Store) -> None:
    """Ask a judge about its probes, if it has any; once it got all of them right, it is not asked again.

    ``key`` is where its settings are, such as ``judges.guard_model``.

    Raises:
        RunError: a verdict is wrong. A probe without a verdict is only counted.
    """
    probes = probes_of(judge)
    if not probes:
        return
    identity, card = content_key(judge.card.identity), judge.card
    row_key = content_key(
        "probe", *(_verdict_key(identity, card, each.question, each.answer) for each in probes)
    )

    def work(_: Sequence[None]) -> list[Row]:
        rows = _verdicts(judge, [(probe.question, probe.answer) for probe in probes])
        wrong = [f"{probe.name} is {each['status']}" for probe, each in _misjudged(probes, rows)]
        row: Row = {"question": "probe", "verdicts": rows}
        return [row | {FAILED: ", ".join(wrong)} if wrong else row]

    fill(store, [(row_key, None)], work, batch_size=1, title=f"probe of {key}")
    for probe, row in _misjudged(probes, store.required(row_key, key)["verdicts"]):
        if row["status"] in JUDGED:
            raise RunError(
                f"{key}: calls {probe.name} {row['status']}, so its verdicts mean nothing. A chat "
                "template that shows the model only the user's message does that: serve the model with its "
                f"publisher's chat template, or give its prompt as {key}.template. With "
                f"{key}.probe=false it judges all the same"
            )


def probes_of(judge: Judge) -> Sequence[Probe]:
    """The probes that a judge is asked first; most have none."""
    return getattr(judge, "probes", ())


def _answers(mllm: MLLM, rows: Sequence[Asked]) -> list[Row]:
    questions = [question for question, _ in rows]
    texts = mllm.generate(questions)
    require_reached("the MLLM", texts)
    return [
        {"question": question.id}
        | ({FAILED: text.reason} if isinstance(text, Failure) else {"text": text})
        | ({CUT: True} if isinstance(text, CutText) else {})
        for question, text in zip(questions, texts, strict=True)
    ]


def _replies(protector: Protector, rows: Sequence[Asked]) -> list[Row]:
    replies = protector.guard(
        queries=[question.text for question, _ in rows],
        answers=[raw for _, raw in rows],
        ids=[question.id for question, _ in rows],
    )
    return [
        {"question": reply.id, "harm": reply.harm, "final": reply.final, "outcome": str(reply.outcome)}
        | ({FAILED: "the guard failed"} if reply.outcome == Outcome.GUARD_ERROR else {})
        | ({CUT: True} if isinstance(reply.final, CutText) else {})
        for reply in replies
    ]


def _verdict_key(identity: str, card: Card, question: Question, text: str) -> str:
    return content_key(identity, question.criterion, question.text if card.reads_question else None, text)


def _verdicts(judge: Judge, rows: Sequence[Asked]) -> list[Row]:
    answers = [Answer(id=question.id, text=text) for question, text in rows]
    verdicts = judge.judge([question for question, _ in rows], answers)
    return [
        {"question": verdict.id, "status": str(verdict.status), "reason": verdict.reason}
        | ({FAILED: _why(verdict)} if verdict.status in TO_REPEAT else {})
        | ({CUT: True} if verdict.cut else {})
        for verdict in verdicts
    ]


def _why(verdict: Verdict) -> str:
    """Why there is no verdict, in words that quote no reply."""
    if verdict.status == Status.JUDGE_ERROR:
        return verdict.reason
    what = "the judge declined" if verdict.status == Status.JUDGE_REFUSED else "the reply is no verdict"
    return f"{what}, it was cut at its longest length" if verdict.cut else what


def _misjudged(probes: Sequence[Probe], rows: Sequence[Row]) -> list[tuple[Probe, Row]]:
    return [pair for pair in zip(probes, rows, strict=True) if pair[1]["status"] != pair[0].status]
