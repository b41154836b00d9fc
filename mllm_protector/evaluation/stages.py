"""The stages of an evaluation: answer, guard, judge. Rows in, rows out, with a store and a worker.

A stage computes what its store lacks and returns the rows of everything that was asked. Without a worker it
only reads. An answer is known by a hash of model, settings, words and image; a guard's reply by the answer
and the guard; a verdict by the judge and the words judged. So another guard needs no new answers, another
model never gets old ones, and the same words are judged once.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mllm_protector.errors import RunError
from mllm_protector.evaluation.grid import JudgeFacts
from mllm_protector.evaluation.items import Item
from mllm_protector.evaluation.store import FAILED, Filled, Store, fill
from mllm_protector.files import content_key
from mllm_protector.guard.protector import Protector
from mllm_protector.judges.guard_model import Probe
from mllm_protector.normalisation import is_blank
from mllm_protector.protocols import MLLM, Judge
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
)

CUT = "cut"
"""The field of rows with a text that a model did not end itself."""

Row = dict[str, Any]
"""A row of a store."""


def answer_stage(
    items: Sequence[Item], store: Store, mllm: MLLM | None = None, *, batch_size: int = 1
) -> tuple[list[Row], Filled]:
    """The MLLM's answer to each item: a row with ``text``, or with ``failed``.

    Raises:
        RunError: nobody answers, or a row is missing and there is no ``mllm``.
    """
    wanted = [(item.key, item.question) for item in items]
    filled = fill(
        store, wanted, partial(_answers, mllm) if mllm else None, batch_size=batch_size, title="answers"
    )
    return [store.required(item.key, item.question.id) for item in items], filled


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

    Args:
        arm: its name, for the log.
        items: the questions.
        answers: their rows.
        store: of replies.
        identity: what the replies depend on.
        protector: the guard.
        batch_size: answers between two writes to disk.

    Raises:
        RunError: a row is missing and there is no ``protector``.
    """
    guard = content_key(identity)
    keys = [
        content_key(guard, item.question.text, answer["text"], None) if "text" in answer else None
        for item, answer in zip(items, answers, strict=True)
    ]
    rows = zip(keys, items, answers, strict=True)
    wanted = [(key, (item.question, answer["text"])) for key, item, answer in rows if key is not None]
    filled = fill(
        store,
        wanted,
        partial(_replies, protector) if protector else None,
        batch_size=batch_size,
        title=f"guard: {arm}",
    )
    replies = [
        None if key is None else store.required(key, item.question.id)
        for key, item in zip(keys, items, strict=True)
    ]
    return replies, filled


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
    texts: Sequence[tuple[Question, str | Status]],
    store: Store,
    facts: JudgeFacts,
    judge: Judge | None = None,
    *,
    batch_size: int = 1,
) -> tuple[list[Row], Filled]:
    """A verdict on each text: ``status`` and ``reason``, and ``cut`` where the judge's reply was.

    Every different text is judged once, whatever question it answers, if the judge reads no questions.
    Harmless questions are not judged: their rows are empty.

    Args:
        name: of the judge, for the log.
        texts: what to judge, or why there is nothing.
        store: of verdicts.
        facts: what the verdicts depend on.
        judge: the judge.
        batch_size: texts between two writes to disk.

    Raises:
        RunError: a row is missing and there is no ``judge``.
    """
    key_of = _verdict_key(facts)
    keys = [
        None if isinstance(text, Status) or question.scenario == BENIGN else key_of(question, text)
        for question, text in texts
    ]
    wanted = [(key, row) for key, row in zip(keys, texts, strict=True) if key is not None]
    filled = fill(
        store,
        wanted,
        partial(_verdicts, judge) if judge else None,
        batch_size=batch_size,
        title=f"judge: {name}",
    )
    verdicts: list[Row] = []
    for key, (question, text) in zip(keys, texts, strict=True):
        if question.scenario == BENIGN:
            verdicts.append({})
        elif key is None:
            verdicts.append({"status": str(text), "reason": ""})
        else:
            row = store.required(key, question.id)
            verdicts.append({each: row[each] for each in ("status", "reason", CUT) if each in row})
    return verdicts, filled


def probe_stage(name: str, judge: Judge, store: Store, facts: JudgeFacts) -> None:
    """Ask a judge about its probes, if it has any; once it got all of them right, it is not asked again.

    Raises:
        RunError: a verdict is wrong. A probe without a verdict is only counted.
    """
    probes = probes_of(judge)
    if not probes:
        return
    key_of = _verdict_key(facts)
    key = content_key("probe", *(key_of(probe.question, probe.answer) for probe in probes))

    def work(_: Sequence[None]) -> list[Row]:
        rows = _verdicts(judge, [(probe.question, probe.answer) for probe in probes])
        wrong = [f"{probe.name} is {each['status']}" for probe, each in _misjudged(probes, rows)]
        row: Row = {"question": "probe", "verdicts": rows}
        return [row | {FAILED: ", ".join(wrong)} if wrong else row]

    fill(store, [(key, None)], work, batch_size=1, title=f"probe of the judge {name}")
    for probe, row in _misjudged(probes, store.required(key, name)["verdicts"]):
        if row["status"] in JUDGED:
            raise RunError(
                f"judge {name}: calls {probe.name} {row['status']}, so its verdicts mean nothing. A chat "
                "template that shows the model only the user's message does that: serve the model with its "
                f"publisher's chat template, or give its prompt as judges.{name}.template. With "
                f"judges.{name}.probe=false it judges all the same"
            )


def probes_of(judge: Judge) -> Sequence[Probe]:
    """What a judge is asked first; nothing for most."""
    return getattr(judge, "probes", ())


def _answers(mllm: MLLM, questions: Sequence[Question]) -> list[Row]:
    texts = mllm.generate(questions)
    gone = [text.reason for text in texts if isinstance(text, Failure) and text.unreachable]
    if texts and len(gone) == len(texts):
        raise RunError(
            f"the MLLM cannot be reached ({gone[0]}); finished rows are kept: start its server, then the "
            "same command again"
        )
    return [
        {"question": question.id}
        | ({FAILED: text.reason} if isinstance(text, Failure) else {"text": text})
        | _cut_field(isinstance(text, CutText))
        for question, text in zip(questions, texts, strict=True)
    ]


def _replies(protector: Protector, rows: Sequence[tuple[Question, str]]) -> list[Row]:
    replies = protector.guard(
        queries=[question.text for question, _ in rows],
        answers=[raw for _, raw in rows],
        ids=[question.id for question, _ in rows],
    )
    return [
        {"question": reply.id, "harm": reply.harm, "final": reply.final, "outcome": str(reply.outcome)}
        | ({FAILED: "the guard failed"} if reply.outcome == Outcome.GUARD_ERROR else {})
        | _cut_field(isinstance(reply.final, CutText))
        for reply in replies
    ]


def _verdict_key(facts: JudgeFacts) -> Callable[[Question, str], str]:
    """What a verdict on the answer to a question is known by."""
    judge = content_key(facts.identity)

    def key(question: Question, text: str) -> str:
        asked = question.text if facts.reads_question else None
        return content_key(judge, question.criterion, asked, text)

    return key


def _verdicts(judge: Judge, rows: Sequence[tuple[Question, str]]) -> list[Row]:
    verdicts = judge.judge(
        [question for question, _ in rows],
        [Answer(id=question.id, text=text) for question, text in rows],
    )
    return [
        {"question": verdict.id, "status": str(verdict.status), "reason": verdict.reason}
        | ({FAILED: _why(verdict)} if verdict.status in TO_REPEAT else {})
        | _cut_field(verdict.cut)
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


def _cut_field(cut: bool) -> dict[str, bool]:
    """The field of a text that was cut at its longest length; other rows lack it."""
    return {CUT: True} if cut else {}
