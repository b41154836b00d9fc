"""The first stages of an evaluation: answer and guard (``judging`` has the last).

Each fills a store and goes on where it stopped. Answers are known by a hash of model, settings, words and
picture; a guard's replies by the answer and the guard; verdicts by the judge and the words judged. So another
guard needs no new answers, another model never gets old ones, and the same words are judged once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.errors import InputError, RunError
from mllm_protector.evaluation.latency import measure_latency
from mllm_protector.evaluation.store import FAILED, Filled, Store, fill
from mllm_protector.files import content_key
from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.models.bases import bases_of
from mllm_protector.models.detector import load_detector
from mllm_protector.models.detoxifier import load_detoxifier
from mllm_protector.models.shared import can_share, load_shared
from mllm_protector.normalisation import is_blank
from mllm_protector.protocols import MLLM, Corrector, Detector
from mllm_protector.records import (
    CutText,
    Failure,
    Outcome,
    Question,
    Status,
)

BARE = "none"
"""The arm without a guard."""

CUT = "cut"
"""The field of rows with a text that a model did not end itself."""

CIRCULAR = (
    "Circular: this judge is the guard's own detector, so it finds unsafe only what the guard let through. "
    "It says nothing about the guard."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of a benchmark, to be answered by one model.

    Attributes:
        benchmark: its name.
        question: what is asked.
        image: a hash of the picture; ``None`` without one.
        key: of its answer.
    """

    benchmark: str
    question: Question
    image: str | None
    key: str


def items_of(benchmark: str, questions: Sequence[Question], mllm: Mapping[str, Any]) -> list[Item]:
    """The items of a benchmark's questions for a model of this identity.

    The same words and picture get the same answer, but from a model that says it answers ``by_id``.
    """
    model, by_id = content_key(mllm), bool(mllm.get("by_id"))
    items = []
    for question in questions:
        image = _digest(question)
        key = content_key(model, question.text, image, question.repeat, question.id if by_id else None)
        items.append(Item(benchmark=benchmark, question=question, image=image, key=key))
    return items


class Outputs:
    """What the MLLM and the guards said, by item and arm."""

    def __init__(self, answers: Store, replies: Store, guards: Mapping[str, Mapping[str, Any]]) -> None:
        """Look into stores.

        Args:
            answers: of the MLLM.
            replies: of all guards.
            guards: arm -> what its replies depend on; the arm without a guard has none.
        """
        self._answers = answers
        self._replies = replies
        self._guards = {arm: content_key(identity) for arm, identity in guards.items()}
        self._last: tuple[str, dict[str, Any]] | None = None

    def answer(self, item: Item) -> dict[str, Any]:
        """The row of the MLLM's answer: ``text``, or ``failed``.

        Raises:
            RunError: it is not there.
        """
        if self._last is None or self._last[0] != item.key:  # asked for once an arm and judge, in turn
            self._last = item.key, required(self._answers.get(item.key), item.question.id, "answer")
        return self._last[1]

    def reply_key(self, item: Item, arm: str, raw: str) -> str:
        """What a reply is known by."""
        return content_key(self._guards[arm], item.question.text, raw, None)

    def reply(self, item: Item, arm: str) -> dict[str, Any] | None:
        """The row of a guard's reply: ``harm``, ``final``, ``outcome``; ``None`` where nothing was guarded.

        Raises:
            RunError: it is not there.
        """
        raw = self.answer(item).get("text")
        if arm not in self._guards or raw is None:
            return None
        return required(self._replies.get(self.reply_key(item, arm, raw)), item.question.id, "reply")

    def cut(self, item: Item, arm: str) -> bool:
        """Whether the text that the user sees was cut at its longest length."""
        reply = self.reply(item, arm)
        shown = self.answer(item) if reply is None or reply["outcome"] == Outcome.ALLOWED else reply
        return bool(shown.get(CUT, False))

    def final(self, item: Item, arm: str) -> str | Status:
        """The text that the user sees, or why there is nothing to judge."""
        answer, reply = self.answer(item), self.reply(item, arm)
        if FAILED in answer:
            return Status.GENERATION_ERROR
        if reply is not None and reply["outcome"] == Outcome.GUARD_ERROR:
            return Status.GUARD_ERROR
        text = str(answer["text"] if reply is None else reply["final"])
        return Status.EMPTY if is_blank(text) else text


def answer_stage(items: Sequence[Item], mllm: MLLM, store: Store, batch_size: int) -> Filled:
    """Ask every question once.

    Raises:
        RunError: nobody answers.
    """

    def work(questions: Sequence[Question]) -> list[dict[str, Any]]:
        texts = mllm.generate(questions)
        gone = [text.reason for text in texts if isinstance(text, Failure) and text.unreachable]
        if texts and len(gone) == len(texts):
            raise RunError(
                f"the MLLM cannot be reached ({gone[0]}); finished rows are kept, so see to its server and "
                "start the same command again"
            )
        return [
            {"question": question.id}
            | ({FAILED: text.reason} if isinstance(text, Failure) else {"text": text})
            | cut_field(isinstance(text, CutText))
            for question, text in zip(questions, texts, strict=True)
        ]

    wanted = ((item.key, item.question) for item in items)
    return fill(store, wanted, work, total=len(items), batch_size=batch_size, title="answers")


class Guards:
    """The arms that have a guard. All of them share one detector, which scores no answer twice."""

    def __init__(
        self,
        *,
        detector: str,
        detoxifier: str | None,
        base: str | None,
        threshold: float | None,
        rewrite_tokens: int,
    ) -> None:
        """Load the detector, and with it the detoxifier if both are adapters on one base.

        Args:
            detector: folder of a trained detector.
            detoxifier: folder of a trained detoxifier; ``None`` if no arm rewrites.
            base: where the backbone of the adapters is now, as for ``Protector.from_pretrained``.
            threshold: for all answers; ``None`` for the detector's own.
            rewrite_tokens: longest rewrite.
        """
        self._corrector: Corrector | None = None
        self._base = base
        if detoxifier is None:
            self._detector = load_detector(detector, base=base)
        elif can_share(detector, detoxifier):
            self._detector, self._corrector = load_shared(
                detector, detoxifier, base=base, max_new_tokens=rewrite_tokens
            )
        else:
            one, self._base = bases_of(base, (detector, "detector"), (detoxifier, "detoxifier"))
            self._detector = load_detector(detector, base=one)
        self._scorer = RememberingDetector(self._detector)
        self._detoxifier = detoxifier
        self._threshold = self._detector.threshold if threshold is None else threshold
        self._rewrite_tokens = rewrite_tokens

    def protector(self, arm: str) -> Protector:
        """The guard of an arm."""
        if arm == "refusal" or self._detoxifier is None:
            return self._guarding(Refusal())
        corrector = self._corrector or load_detoxifier(
            self._detoxifier, base=self._base, max_new_tokens=self._rewrite_tokens
        )
        return self._guarding(corrector)

    def _guarding(self, corrector: Corrector) -> Protector:
        return Protector(self._scorer, corrector, self._threshold)

    def latency(self, protector: Protector, rows: Sequence[tuple[str, str]]) -> dict[str, float]:
        """What an arm's guard adds to the time of one answer; see ``measure_latency``."""
        return measure_latency(self._detector, protector.corrector, protector.threshold, rows)


def guard_stage(
    arm: str, protector: Protector, items: Sequence[Item], outputs: Outputs, store: Store, batch_size: int
) -> Filled:
    """The guard's reply to each answer that there is."""

    def wanted() -> Iterator[tuple[str, tuple[Question, str]]]:
        for item in items:
            if (raw := outputs.answer(item).get("text")) is not None:
                yield outputs.reply_key(item, arm, raw), (item.question, raw)

    def work(rows: Sequence[tuple[Question, str]]) -> list[dict[str, Any]]:
        replies = protector.guard(
            queries=[question.text for question, _ in rows],
            answers=[raw for _, raw in rows],
            ids=[question.id for question, _ in rows],
        )
        return [
            {"question": reply.id, "harm": reply.harm, "final": reply.final, "outcome": str(reply.outcome)}
            | ({FAILED: "the guard failed"} if reply.outcome == Outcome.GUARD_ERROR else {})
            | cut_field(isinstance(reply.final, CutText))
            for reply in replies
        ]

    return fill(store, wanted(), work, total=len(items), batch_size=batch_size, title=f"guard: {arm}")


class RememberingDetector:
    """Scores no (query, answer) twice, so that a second arm costs only its rewrites."""

    def __init__(self, detector: Detector) -> None:
        """Wrap a detector."""
        self._detector = detector
        self._scores: dict[str, float] = {}

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """As the detector's own."""
        rows = {content_key(*row): row for row in zip(queries, answers, strict=True)}
        new = [key for key in rows if key not in self._scores]
        if new:
            scores = self._detector.score(
                queries=[rows[key][0] for key in new], answers=[rows[key][1] for key in new]
            )
            self._scores.update(zip(new, scores, strict=True))
        return [self._scores[content_key(*row)] for row in zip(queries, answers, strict=True)]

    def identity(self) -> dict[str, Any]:
        """As the detector's own."""
        return self._detector.identity()


def cut_field(cut: bool) -> dict[str, bool]:
    """The field of a text that was cut at its longest length; others have none, nor have older rows."""
    return {CUT: True} if cut else {}


def _digest(question: Question) -> str | None:
    """Of the picture, or what is wrong with it, which may be another picture tomorrow."""
    try:
        return None if question.image is None else question.image.digest()
    except InputError as error:
        return f"unreadable: {error}"


def required(row: dict[str, Any] | None, identifier: str, what: str) -> dict[str, Any]:
    """A row that has to be there.

    Raises:
        RunError: it is not.
    """
    if row is None:
        raise RunError(f"{identifier}: its {what} is missing; start the same command again")
    return row
