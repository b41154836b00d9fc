"""The records that travel between modules.

**The harm convention, stated here once.** ``harmful=True`` means that an answer does harm. The detector's
logit is positive for harmful answers, and its score is P(harmful). The paper has h = 1 for *harmless*.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from mllm_protector.errors import RunError
from mllm_protector.images import ImageSource
from mllm_protector.scenarios import Criterion

Variant = Literal["TEXT", "SD", "TYPO", "SD_TYPO"]
"""How a benchmark question is asked: as text only, or with one of the three kinds of image."""

VARIANTS: tuple[Variant, ...] = ("TEXT", "SD", "TYPO", "SD_TYPO")

BENIGN = "Benign"
"""The scenario of harmless questions: not judged for harm, but checked for being left alone and answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """One query with the answer to learn (accepted) and the answer to avoid (rejected).

    Some sets have pairs of two harmful or two harmless answers. ``scenario`` is the kind of harm that the set
    names, if it does; it makes no other record.
    """

    query: str
    accepted: str
    rejected: str
    accepted_harmful: bool = False
    rejected_harmful: bool = True
    scenario: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswer:
    """What the detector learns from: (question, answer, harm label)."""

    query: str
    answer: str
    harmful: bool
    scenario: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What the detoxifier learns from: given the query and the rejected answer, write the accepted one."""

    query: str
    rejected: str
    accepted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One benchmark question.

    Attributes:
        id: unique and stable, such as ``01-Illegal_Activitiy/SD_TYPO/5``.
        scenario: a scenario's name, or ``BENIGN``.
        variant: how it is asked.
        text: the words sent to the MLLM, and the query that the guard sees.
        image: loaded only when the MLLM needs it; ``None`` for text-only questions.
        criterion: what its answers are judged by.
        base: what questions share that ask the same thing, such as ``01-Illegal_Activitiy/5``, so that their
            answers are not independent. ``None`` if nothing shares it.
        twin: what an unsafe question and its safe counterpart share, which look alike and need opposite
            answers. ``None`` without a counterpart.
        repeat: the number of this asking, from 0.
    """

    id: str
    scenario: str
    variant: Variant
    text: str
    image: ImageSource | None = None
    criterion: Criterion = Criterion.HARM
    base: str | None = None
    twin: str | None = None
    repeat: int = 0

    @property
    def cluster(self) -> str:
        """What this question shares with those that ask the same thing in another way."""
        return self.id if self.base is None else self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Stands in place of a text that could not be made.

    Attributes:
        reason: what went wrong, in one line that never quotes a question or an answer.
        refused: the service itself declined, as a content filter does.
        unreachable: nobody answered at all, so that going on is of no use.
    """

    reason: str
    refused: bool = False
    unreachable: bool = False


def require_reached(who: str, replies: Sequence[str | Failure]) -> None:
    """Stop where a server answered nothing at all: going on would only fail.

    Raises:
        RunError: nobody answered any of the requests.
    """
    gone = [reply.reason for reply in replies if isinstance(reply, Failure) and reply.unreachable]
    if replies and len(gone) == len(replies):
        reason = " ".join(gone[0].split())
        raise RunError(
            f"{who} cannot be reached ({reason}); finished rows are kept: start its server, then the same"
            " command again"
        )


class CutText(str):
    """A text that a model did not end: it was cut at the longest length that was asked for."""

    __slots__ = ()

    def strip(self, chars: str | None = None, /) -> "CutText":
        """As of any text; it stays known as cut."""
        return CutText(super().strip(chars))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The MLLM's own words."""

    id: str
    text: str


class Outcome(StrEnum):
    """What the guard did with an answer."""

    ALLOWED = "allowed"
    """Scored as harmless and passed on unchanged."""
    REWRITTEN = "rewritten"
    """Flagged, and replaced by the corrector's text."""
    REFUSED = "refused"
    """Flagged, and replaced by a refusal: by design, or because no usable rewrite was made."""
    TOO_LONG = "too_long"
    """Longer than the guard reads, and replaced by a refusal."""
    GUARD_ERROR = "guard_error"
    """The guard itself failed; a refusal was returned, never the raw answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer after the guard.

    Attributes:
        id: the question's id.
        raw: the MLLM's own answer. Never show it to a user.
        harm: P(harmful) of ``raw``, or ``None`` if it could not be scored.
        final: what the user may see.
    """

    id: str
    raw: str
    harm: float | None
    final: str
    outcome: Outcome


class Status(StrEnum):
    """How an answer ends in the accounts: a verdict, or why there is none (counted, never guessed)."""

    HARMFUL = "harmful"
    SAFE = "safe"
    UNPARSEABLE = "unparseable"
    """The judge's reply is no verdict, also when asked again."""
    JUDGE_REFUSED = "judge_refused"
    """The judge declined to judge."""
    JUDGE_ERROR = "judge_error"
    """The judge failed."""
    GENERATION_ERROR = "generation_error"
    """The MLLM made no answer."""
    EMPTY = "empty"
    """The answer is empty."""
    GUARD_ERROR = "guard_error"
    """The guard failed; the user saw a refusal."""


JUDGED = (Status.HARMFUL, Status.SAFE)

TO_REPEAT = (Status.UNPARSEABLE, Status.JUDGE_REFUSED, Status.JUDGE_ERROR)
"""What the next run asks the judge again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's word on one answer.

    Attributes:
        id: the question's id.
        status: ``HARMFUL`` or ``SAFE``, or ``EMPTY`` or one of ``TO_REPEAT``.
        reason: why, in one line.
        cut: the judge's reply was cut at its longest length.
    """

    id: str
    status: Status
    reason: str
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Decisions against labels, counted; harmful is the positive class. A share of nothing is ``None``.

    Attributes:
        source: the answers on which it was counted, in words.
        criterion: what harmful means here; errors by one criterion say nothing of another.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    source: str = ""
    criterion: Criterion = Criterion.HARM

    @property
    def total(self) -> int:
        """The answers that were counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def accuracy(self) -> float | None:
        """The share of right decisions."""
        return _share(self.tp + self.tn, self.total)

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; 0 where no harmful answer is called harmful."""
        return _share(2 * self.tp, 2 * self.tp + self.fn + self.fp)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBenchmark:
    """The questions of a benchmark, and what is known about them.

    Attributes:
        questions: in a fixed order, with unique ids.
        missing: one ``id: reason`` for each question that had to be left out, such as a missing image.
        groups: name -> scenarios that are reported together and apart from the others.
        truth: says whether an answer does harm, where that is known by construction (toy data only).
        score: for harmless questions with a known answer: how right a text is, in [0, 1].
        metrics: what else the benchmark reports of texts, by the ``cluster`` of their questions.
    """

    questions: list[Question]
    missing: list[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    truth: Callable[[str], bool] | None = None
    score: Callable[[Question, str], float] | None = None
    metrics: Callable[[Mapping[str, str]], Mapping[str, float | None]] | None = None


def labelled_answers(records: Iterable[AnswerPair | LabelledAnswer]) -> Iterator[LabelledAnswer]:
    """The detector's view: each answer of each pair with its own harm label."""
    for record in records:
        if isinstance(record, LabelledAnswer):
            yield record
            continue
        for answer, harmful in (
            (record.accepted, record.accepted_harmful),
            (record.rejected, record.rejected_harmful),
        ):
            yield LabelledAnswer(query=record.query, answer=answer, harmful=harmful, scenario=record.scenario)


def corrections(
    pairs: Iterable[AnswerPair], both_harmful: Literal["drop", "safer"] = "drop"
) -> Iterator[Correction]:
    """The detoxifier's view: harmful answers with the harmless answer that should replace them.

    Pairs whose rejected answer is harmless are left out: the detoxifier only ever sees flagged answers.

    Where the accepted answer is harmful too, ``drop`` leaves the pair out, and ``safer`` learns that answer,
    the less harmful of the two. (The official code learns one fixed refusal there.)
    """
    for pair in pairs:
        if pair.rejected_harmful and (not pair.accepted_harmful or both_harmful == "safer"):
            yield Correction(query=pair.query, rejected=pair.rejected, accepted=pair.accepted)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
