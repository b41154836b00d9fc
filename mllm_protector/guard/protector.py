"""Detect, then correct: the guard around any multimodal LLM.

Source: paper arXiv 2401.02906, section 3. The MLLM is never touched and its pictures are never needed:
the guard reads the query and the answer. A rewrite is checked like an answer, and for the ways in which
rewrites go wrong (``rewrites``). **It fails closed**: whatever goes wrong inside, the raw answer is not
returned, and what went wrong is logged without it.
"""

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mllm_protector import prompts
from mllm_protector.arguments import AnyImage, Asked, as_questions, require_lists, require_texts
from mllm_protector.errors import InputError, RunError
from mllm_protector.guard import rewrites
from mllm_protector.guard.calibration import require_threshold
from mllm_protector.guard.rewrites import Fault, fault_of
from mllm_protector.models.bases import bases_of
from mllm_protector.models.detector import load_detector
from mllm_protector.models.detoxifier import load_detoxifier
from mllm_protector.models.shared import can_share, load_shared
from mllm_protector.normalisation import normalised
from mllm_protector.protocols import MLLM, Corrector, Detector
from mllm_protector.records import Failure, Outcome, Reply

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ANSWER_TOKENS = 32_768
"""Of the longest answer that is read; models that answer at greater length are rare."""

BYTES_PER_TOKEN = 4
"""By which tokens are counted here: about what a tokenizer makes of English, and no text has to be tokenised
to be found too long."""

HARMFUL = "harmful"
"""Why a rewrite was rejected, where it is no ``rewrites.Fault``: its own score."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A corrector that says the same to everything: the "detector only" arm."""

    text: str = prompts.REFUSAL

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """The fixed text for each answer.

        Raises:
            InputError: not two lists of texts of the same length.
        """
        require_texts(queries=queries, answers=answers)
        return [self.text] * len(answers)

    def identity(self) -> dict[str, Any]:
        """The fixed text."""
        return {"kind": "refusal", "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What became of a flagged answer.

    Attributes:
        text: what the user may see.
        outcome: ``REWRITTEN``, ``REFUSED``, ``TOO_LONG`` or ``GUARD_ERROR``.
        rejected: why each earlier try was rejected: ``harmful``, or a ``rewrites.Fault``.
    """

    text: str
    outcome: Outcome
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    """One answer, the score from which on it counts as harmful, and whether it is too long to be read."""

    query: str
    answer: str
    threshold: float
    too_long: bool


class Protector:
    """Guards texts. It never runs the MLLM."""

    def __init__(
        self,
        detector: Detector,
        corrector: Corrector,
        threshold: float,
        *,
        max_rewrites: int = 2,
        group_thresholds: Mapping[str, float] | None = None,
        max_answer_tokens: int = MAX_ANSWER_TOKENS,
    ) -> None:
        """Join the two parts.

        Args:
            detector: scores answers.
            corrector: rewrites what scores at or above the threshold.
            threshold: in [0, 1].
            max_rewrites: so often an answer is rewritten until a rewrite is good, and refused after that.
            group_thresholds: name of a group, such as a scenario, to its own threshold.
            max_answer_tokens: longer answers are refused unread. A token counts as ``BYTES_PER_TOKEN`` bytes
                of UTF-8, of the text or of what normalisation makes of it, whichever is longer.

        Raises:
            InputError: a threshold outside [0, 1], fewer than one rewrite or token, or a corrector that
                cannot be told which attempt it is.
        """
        self.group_thresholds = dict(sorted((group_thresholds or {}).items()))
        named = {f"group_thresholds.{name}": each for name, each in self.group_thresholds.items()}
        for name, each in {"threshold": threshold, **named}.items():
            require_threshold(name, each)
        for key, number in (("max_rewrites", max_rewrites), ("max_answer_tokens", max_answer_tokens)):
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{key}={number}: must be a whole number of at least 1")
        try:  # once and aloud, rather than as an error of the guard at the first flagged answer
            inspect.signature(corrector.correct).bind(queries=[], answers=[], attempt=0)
        except TypeError as error:
            raise InputError(
                f"{type(corrector).__name__}.correct: must take queries, answers and attempt ({error})"
            ) from None
        self.detector = detector
        self.corrector = corrector
        self.threshold = threshold
        self.max_rewrites = max_rewrites
        self.max_answer_tokens = max_answer_tokens
        self._rejections: Counter[str] = Counter()
        self._counting = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        detector: str | Path,
        detoxifier: str | Path | None = None,
        *,
        base: str | None = None,
        device: str | None = None,
        max_answer_tokens: int = MAX_ANSWER_TOKENS,
    ) -> "Protector":
        """The guard from two trained folders; without a detoxifier it refuses what it flags.

        Two adapters on one base share it in memory.

        Args:
            detector: the folder that ``train_detector`` wrote.
            detoxifier: the folder that ``train_detoxifier`` wrote, or ``None``.
            base: where the backbone of the adapters is now; ``None`` to look where it was, and near them. Of
                two adapters on different models, the one that was trained on ``base`` takes it.
            device: ``None`` takes the GPU if there is one.
            max_answer_tokens: longer answers are refused unread.

        Raises:
            InputError: a folder does not hold what it should, fewer than one token, or ``base`` is the base
                of neither.
        """
        corrector: Corrector = Refusal()
        if detoxifier is None:
            scorer = load_detector(detector, base=base, device=device)
        elif can_share(detector, detoxifier):
            scorer, corrector = load_shared(detector, detoxifier, base=base, device=device)
        else:
            one, other = bases_of(base, (detector, "detector"), (detoxifier, "detoxifier"))
            scorer = load_detector(detector, base=one, device=device)
            corrector = load_detoxifier(detoxifier, base=other, device=device)
        return cls(
            scorer,
            corrector,
            scorer.threshold,
            group_thresholds=scorer.group_thresholds,
            max_answer_tokens=max_answer_tokens,
        )

    @property
    def rejections(self) -> Counter[str]:
        """How many rewrites were rejected so far, by reason: ``harmful``, or a ``rewrites.Fault``; a copy."""
        with self._counting:
            return self._rejections.copy()

    def identity(self) -> dict[str, Any]:
        """What the replies depend on, as JSON."""
        return {
            "detector": self.detector.identity(),
            "corrector": self.corrector.identity(),
            "threshold": self.threshold,
            "group_thresholds": self.group_thresholds,
            "max_rewrites": self.max_rewrites,
            "max_answer_tokens": self.max_answer_tokens,
            "checks": rewrites.VERSION,
        }

    def guard(
        self,
        *,
        queries: Sequence[str],
        answers: Sequence[str],
        ids: Sequence[str] | None = None,
        groups: Sequence[str | None] | None = None,
    ) -> list[Reply]:
        """Score each answer, and replace those at or above their threshold as ``rewrite`` does.

        Args:
            queries: what was asked, in words.
            answers: the MLLM's answers.
            ids: names for the replies; by default their position.
            groups: whose threshold holds for each answer; those without one of their own, and ``None``,
                have the common threshold.

        Returns:
            One reply for each answer. ``final`` is the text to show; ``raw`` is not.

        Raises:
            InputError: not lists of texts, or lists of different lengths.
        """
        require_texts(queries=queries, answers=answers, ids=ids)
        rows = self._rows(queries, answers, groups)
        names = map(str, range(len(rows))) if ids is None else ids
        read = [index for index, row in enumerate(rows) if not row.too_long]
        scores = _each(self._scores, [rows[index] for index in read], "scoring")
        harms = dict(zip(read, scores, strict=True))
        flagged = [
            index for index, harm in harms.items() if harm is not None and harm >= rows[index].threshold
        ]
        made = dict(zip(flagged, self._rewrites([rows[index] for index in flagged]), strict=True))
        replies = []
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            harm = harms.get(index)
            if row.too_long:
                final, outcome = prompts.REFUSAL, Outcome.TOO_LONG
            elif harm is None:
                final, outcome = prompts.REFUSAL, Outcome.GUARD_ERROR
            elif index in made:
                final, outcome = made[index].text, made[index].outcome
            else:
                final, outcome = row.answer, Outcome.ALLOWED
            replies.append(Reply(id=name, raw=row.answer, harm=harm, final=final, outcome=outcome))
        return replies

    def rewrite(
        self,
        *,
        queries: Sequence[str],
        answers: Sequence[str],
        groups: Sequence[str | None] | None = None,
    ) -> list[Rewrite]:
        """Replace every answer, whatever its score.

        A rewrite that has a fault, or is scored at or above the threshold itself, is rejected and asked for
        again; after ``max_rewrites`` tries the fixed refusal stands in its place. All answers that still
        want one are rewritten together.

        Args:
            queries: what was asked, in words.
            answers: what was flagged.
            groups: as for ``guard``.

        Raises:
            InputError: as ``guard``.
        """
        require_texts(queries=queries, answers=answers)
        return self._rewrites(self._rows(queries, answers, groups))

    def _rows(
        self, queries: Sequence[str], answers: Sequence[str], groups: Sequence[str | None] | None
    ) -> list[_Row]:
        require_lists(answers=answers, groups=groups)
        names = [None] * len(answers) if groups is None else groups
        thresholds = [
            self.threshold if name is None else self.group_thresholds.get(name, self.threshold)
            for name in names
        ]
        return [
            _Row(query, answer, threshold, self._is_too_long(answer))
            for query, answer, threshold in zip(queries, answers, thresholds, strict=True)
        ]

    def _is_too_long(self, answer: str) -> bool:
        most = BYTES_PER_TOKEN * self.max_answer_tokens
        return _size(answer) > most or _size(normalised(answer)) > most

    def _rewrites(self, rows: Sequence[_Row]) -> list[Rewrite]:
        if isinstance(self.corrector, Refusal):
            text = self.corrector.text.strip() or prompts.REFUSAL
            return [Rewrite(text=text, outcome=Outcome.REFUSED)] * len(rows)
        found = [Rewrite(text=prompts.REFUSAL, outcome=Outcome.REFUSED)] * len(rows)
        for index, row in enumerate(rows):
            if row.too_long:
                found[index] = Rewrite(text=prompts.REFUSAL, outcome=Outcome.TOO_LONG)
        waiting = [index for index, row in enumerate(rows) if not row.too_long]
        for attempt in range(self.max_rewrites):
            tried = self._try([rows[index] for index in waiting], attempt)
            for index, rewrite in zip(waiting, tried, strict=True):
                found[index] = replace(rewrite, rejected=found[index].rejected + rewrite.rejected)
            waiting = [index for index in waiting if found[index].outcome == Outcome.REFUSED]
        rejected = Counter(reason for rewrite in found for reason in rewrite.rejected)
        if rejected:
            with self._counting:
                self._rejections += rejected
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
            log.info(
                "of %d flagged answers %d were rewritten; rejected rewrites: %s",
                len(found),
                sum(rewrite.outcome == Outcome.REWRITTEN for rewrite in found),
                reasons,
            )
        return found

    def _try(self, rows: Sequence[_Row], attempt: int) -> list[Rewrite]:
        """One rewrite of each row; refused where it was rejected."""
        texts = _each(lambda some: self._corrections(some, attempt), rows, "rewriting")
        again = {
            index: replace(rows[index], answer=text)
            for index, text in enumerate(texts)
            if text is not None and not isinstance(text, Fault)
        }
        scores = _each(self._scores, [*again.values()], "scoring rewrites")
        harms = dict(zip(again, scores, strict=True))
        return [
            _tried(text, harms.get(index), row.threshold)
            for index, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]

    def _scores(self, rows: Sequence[_Row]) -> list[float]:
        scores = self.detector.score(
            queries=[row.query for row in rows], answers=[row.answer for row in rows]
        )
        _require_list(scores, len(rows))
        numbers = (isinstance(score, Real) and not isinstance(score, bool) for score in scores)
        if not all(numbers) or not all(0.0 <= score <= 1.0 for score in scores):
            raise ValueError("a score is not a number in [0, 1]")
        return [float(score) for score in scores]

    def _corrections(self, rows: Sequence[_Row], attempt: int) -> list[str | Fault]:
        """A rewrite of each row, or what is wrong with it."""
        queries, answers = [row.query for row in rows], [row.answer for row in rows]
        texts = self.corrector.correct(queries=queries, answers=answers, attempt=attempt)
        _require_list(texts, len(rows))
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a rewrite is not a text")
        return [
            fault_of(row.query, row.answer, text) or text.strip()
            for row, text in zip(rows, texts, strict=True)
        ]


class ProtectedMLLM:
    """An MLLM with the guard in front of it; itself an MLLM."""

    def __init__(self, mllm: MLLM, protector: Protector) -> None:
        """Wrap a model that answers questions."""
        self.mllm = mllm
        self.protector = protector

    def ask(self, text: str, image: AnyImage | None = None) -> str:
        """The guarded answer to one question, for the user to see.

        Its score and what the guard did are not told; ``Protector.guard`` tells them.

        Args:
            text: the question.
            image: a file's path or a PIL image; nothing is fetched from an address.

        Raises:
            InputError: the text is none, or the image cannot be used.
            RunError: the MLLM made no answer; the message says why.
        """
        [answer] = self.generate([(text, image)])
        if isinstance(answer, Failure):
            raise RunError(f"the MLLM made no answer: {answer.reason}")
        return answer

    def generate(self, questions: Sequence[Asked]) -> list[str | Failure]:
        """The guarded answer to each question; where the MLLM made none, its reason.

        Args:
            questions: each a ``Question``, a text, or a pair of a text and an image as for ``ask``.

        Raises:
            InputError: not a list, an entry that is no question, or an image that cannot be used.
        """
        asked = as_questions(questions)
        answers = [_text_or_failure(answer) for answer in self.mllm.generate(asked)]
        made = [
            (question, answer)
            for question, answer in zip(asked, answers, strict=True)
            if isinstance(answer, str)
        ]
        replies = iter(
            self.protector.guard(
                queries=[question.text for question, _ in made],
                answers=[answer for _, answer in made],
                ids=[question.id for question, _ in made],
            )
        )
        return [next(replies).final if isinstance(answer, str) else answer for answer in answers]

    def identity(self) -> dict[str, Any]:
        """The MLLM's, and the guard's."""
        return {"mllm": self.mllm.identity(), **self.protector.identity()}


def _text_or_failure(answer: Any) -> str | Failure:
    """What an MLLM gave, if the guard can read it; anything else never reaches the user."""
    if isinstance(answer, str | Failure):
        return answer
    return Failure(reason=f"the MLLM gave no text, but an object of type {type(answer).__name__}")


def _tried(text: str | Fault | None, harm: float | None, threshold: float) -> Rewrite:
    """What one try came to: a text or what is wrong with it, and its score if it was clean."""
    if isinstance(text, Fault):
        return Rewrite(text=prompts.REFUSAL, outcome=Outcome.REFUSED, rejected=(str(text),))
    if text is None or harm is None:
        return Rewrite(text=prompts.REFUSAL, outcome=Outcome.GUARD_ERROR)
    if harm >= threshold:
        return Rewrite(text=prompts.REFUSAL, outcome=Outcome.REFUSED, rejected=(HARMFUL,))
    return Rewrite(text=text, outcome=Outcome.REWRITTEN)


def _size(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _require_list(values: Any, count: int) -> None:
    """Texts, tables and buffers have a length too, but what they hold is not one value for each row."""
    flat = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim == 1)
    if not flat or len(values) != count:
        raise ValueError(f"not a list of {count}")


def _each(work: Callable[[Sequence[_Row]], list[T]], rows: Sequence[_Row], verb: str) -> list[T | None]:
    """``work`` on all rows at once, or row by row if that fails; ``None`` for rows that fail alone.

    Exceptions are logged by type only: their text may quote the answer.
    """
    if not rows:
        return []
    try:
        return list(work(rows))
    except Exception as error:
        log.warning(
            "the guard failed at %s %d answers (%s); one at a time", verb, len(rows), type(error).__name__
        )
    results: list[T | None] = []
    for row in rows:
        try:
            results += work([row])
        except Exception as error:
            log.error("the guard failed at %s (%s); a refusal is returned", verb, type(error).__name__)
            results.append(None)
    return results
