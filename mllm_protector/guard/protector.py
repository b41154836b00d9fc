"""Detect, then correct: the guard around any multimodal LLM.

Source: paper arXiv 2401.02906, section 3. The MLLM is never touched and its images are never needed: the
guard reads the query and the answer. A rewrite is scored like an answer, and checked for the ways in which
rewrites go wrong (``rewrites``). **It fails closed**: whatever goes wrong inside, the raw answer is not
returned, and what went wrong is logged without it.
"""

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_protector import prompts
from mllm_protector.arguments import require_texts, require_threshold
from mllm_protector.errors import InputError
from mllm_protector.guard import rewrites
from mllm_protector.guard.rewrites import Fault
from mllm_protector.guard.rows import Row, rewrites_of, scores_of
from mllm_protector.normalisation import normalised
from mllm_protector.protocols import Card, Corrector, Detector
from mllm_protector.records import Outcome, Reply

log = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 32_768
"""Of the longest answer that is read; models that answer at greater length are rare."""

BYTES_PER_TOKEN = 4
"""About what a tokenizer makes of English, so that no text has to be tokenised to be found too long."""

HARMFUL = "harmful"
"""Why a rewrite without a ``rewrites.Fault`` was discarded: its score."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A corrector that says the same to everything: the "detector only" arm."""

    text: str = prompts.REFUSAL

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        """The fixed text for each answer."""
        require_texts(queries=queries, answers=answers)
        return [self.text] * len(answers)

    @property
    def card(self) -> Card:
        """The fixed text."""
        return Card(identity={"kind": "refusal", "text": self.text})


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What takes the place of an answer.

    Attributes:
        text: what the user may see.
        outcome: what the guard did.
        discarded: why each earlier rewrite was discarded: ``harmful``, or a ``rewrites.Fault``.
    """

    text: str
    outcome: Outcome
    discarded: tuple[str, ...] = ()


TOO_LONG = Rewrite(prompts.REFUSAL, Outcome.TOO_LONG)
FAILED = Rewrite(prompts.REFUSAL, Outcome.GUARD_ERROR)
REFUSED = Rewrite(prompts.REFUSAL, Outcome.REFUSED)


class Protector:
    """Guards texts. It never runs the MLLM."""

    def __init__(
        self,
        detector: Detector,
        corrector: Corrector,
        threshold: float,
        *,
        max_rewrites: int = 2,
        max_answer_tokens: int = MAX_ANSWER_TOKENS,
    ) -> None:
        """Join the two parts; the corrector rewrites what scores at or above the threshold.

        After ``max_rewrites`` attempts an answer is refused. Longer answers than ``max_answer_tokens`` are
        refused unread; a token counts as ``BYTES_PER_TOKEN`` bytes of UTF-8, of the text or of its normalised
        form, whichever is longer.

        Raises:
            InputError: a threshold outside [0, 1], fewer than one rewrite or token, or a ``correct`` that
                takes no attempt.
        """
        require_threshold("threshold", threshold)
        for key, number in (("max_rewrites", max_rewrites), ("max_answer_tokens", max_answer_tokens)):
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{key}={number}: must be a whole number of at least 1")
        try:  # now, and not as a guard error at the first flagged answer
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
        self._discarded: Counter[str] = Counter()
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

        Two adapters on one base share it in memory. ``base`` is where the backbone of the adapters is now;
        without it they are looked for where they were, and near them. Of two adapters on different models,
        the one that was trained on ``base`` takes it. Without a ``device``, the GPU is taken if there is one.

        Raises:
            InputError: a folder does not hold what it should, fewer than one token, or ``base`` is the base
                of neither.
        """
        # Here, because torch takes seconds, and not every detector needs it.
        from mllm_protector.models.detector import load_detector
        from mllm_protector.models.shared import load_parts

        corrector: Corrector = Refusal()
        if detoxifier is None:
            scorer = load_detector(detector, base=base, device=device)
        else:
            scorer, corrector = load_parts(detector, detoxifier, base=base, device=device)
        return cls(scorer, corrector, scorer.threshold, max_answer_tokens=max_answer_tokens)

    @property
    def discarded(self) -> Counter[str]:
        """A copy of how many rewrites were discarded so far, by reason (see ``Rewrite.discarded``)."""
        with self._counting:
            return self._discarded.copy()

    @property
    def card(self) -> Card:
        """What the replies depend on, as JSON."""
        return Card(
            identity={
                "detector": self.detector.card.identity,
                "corrector": self.corrector.card.identity,
                "threshold": self.threshold,
                "max_rewrites": self.max_rewrites,
                "max_answer_tokens": self.max_answer_tokens,
                "checks": rewrites.VERSION,
            }
        )

    def guard(
        self, *, queries: Sequence[str], answers: Sequence[str], ids: Sequence[str] | None = None
    ) -> list[Reply]:
        """Score each answer, and replace those at or above the threshold as ``rewrite`` does.

        Of each reply, ``final`` is the text to show; ``raw`` is not. ``ids`` are names for the replies, by
        default their position.

        Raises:
            InputError: not lists of texts, or lists of different lengths.
        """
        require_texts(queries=queries, answers=answers, ids=ids)
        rows = [*map(Row, queries, answers)]
        names = [*map(str, range(len(rows)))] if ids is None else ids
        read = [index for index, row in enumerate(rows) if not self.is_too_long(row.answer)]
        harms = dict(zip(read, scores_of(self.detector, [rows[index] for index in read]), strict=True))
        flagged = [index for index, harm in harms.items() if harm is not None and harm >= self.threshold]
        made = dict.fromkeys(range(len(rows)), TOO_LONG)
        for index, harm in harms.items():
            made[index] = FAILED if harm is None else Rewrite(rows[index].answer, Outcome.ALLOWED)
        made |= zip(flagged, self._rewrite([rows[index] for index in flagged]), strict=True)
        return [
            Reply(
                id=name,
                raw=row.answer,
                harm=harms.get(index),
                final=made[index].text,
                outcome=made[index].outcome,
            )
            for index, (name, row) in enumerate(zip(names, rows, strict=True))
        ]

    def rewrite(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[Rewrite]:
        """Replace every answer, whatever its score.

        A rewrite that has a fault, or scores at or above the threshold itself, is discarded and another one
        is made; after ``max_rewrites`` attempts the fixed refusal takes its place. All answers that still
        need a rewrite are rewritten together.

        Raises:
            InputError: as ``guard``.
        """
        require_texts(queries=queries, answers=answers)
        rows = [*map(Row, queries, answers)]
        too_long = [self.is_too_long(row.answer) for row in rows]
        made = iter(self._rewrite([row for row, long in zip(rows, too_long, strict=True) if not long]))
        return [TOO_LONG if long else next(made) for long in too_long]

    def is_too_long(self, answer: str) -> bool:
        """Whether an answer is refused unread."""
        most = BYTES_PER_TOKEN * self.max_answer_tokens
        return any(len(text.encode(errors="surrogatepass")) > most for text in (answer, normalised(answer)))

    def _rewrite(self, rows: Sequence[Row]) -> list[Rewrite]:
        if isinstance(self.corrector, Refusal):
            text = self.corrector.text.strip() or prompts.REFUSAL
            return [Rewrite(text, Outcome.REFUSED)] * len(rows)
        made = [REFUSED] * len(rows)
        waiting = [*range(len(rows))]
        for attempt in range(self.max_rewrites):
            tried = self._attempt([rows[index] for index in waiting], attempt)
            for index, rewrite in zip(waiting, tried, strict=True):
                made[index] = replace(rewrite, discarded=made[index].discarded + rewrite.discarded)
            waiting = [index for index in waiting if made[index].outcome == Outcome.REFUSED]
        self._count(made)
        return made

    def _attempt(self, rows: Sequence[Row], attempt: int) -> list[Rewrite]:
        """One rewrite of each row, checked and scored; ``REFUSED`` where it is discarded."""
        texts = rewrites_of(self.corrector, rows, attempt)
        sound = {index: text for index, text in enumerate(texts) if text and not isinstance(text, Fault)}
        again = [Row(rows[index].query, text) for index, text in sound.items()]
        harms = dict(zip(sound, scores_of(self.detector, again, "scoring rewrites"), strict=True))
        made = []
        for index, text in enumerate(texts):
            harm = harms.get(index)
            if isinstance(text, Fault):
                made.append(replace(REFUSED, discarded=(str(text),)))
            elif text is None or harm is None:
                made.append(FAILED)
            elif harm >= self.threshold:
                made.append(replace(REFUSED, discarded=(HARMFUL,)))
            else:
                made.append(Rewrite(text, Outcome.REWRITTEN))
        return made

    def _count(self, made: Sequence[Rewrite]) -> None:
        if discarded := Counter(reason for rewrite in made for reason in rewrite.discarded):
            with self._counting:
                self._discarded += discarded
            log.info(
                "%d of %d flagged answers were rewritten; discarded rewrites: %s",
                sum(rewrite.outcome == Outcome.REWRITTEN for rewrite in made),
                len(made),
                ", ".join(f"{reason} {count}" for reason, count in sorted(discarded.items())),
            )
