"""The guard of one model worker: answers of concurrent requests are scored, and rewritten, in batches.

Scores and rewrites have a queue and a thread each, so that no rewrite holds up a score (unless both parts
are adapters on one base, which only one of them can use at a time). All scores, those of rewrites too, are
made in one thread. Whatever fails gives ``guard_error``.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mllm_protector import prompts
from mllm_protector.guard.protector import BYTES_PER_TOKEN, FAILED, REFUSED, TOO_LONG, Protector, Rewrite
from mllm_protector.guard.rows import Row, scores_of
from mllm_protector.guard.windows import size_of
from mllm_protector.protocols import Card
from mllm_protector.records import Outcome
from mllm_protector.serving.metrics import WorkerMetrics
from mllm_protector.serving.queueing import BatchQueue
from mllm_protector.serving.settings import QueueSettings

Score = float | Outcome
"""P(harmful), or why there is none: ``too_long`` or ``guard_error``."""


class Flagged(NamedTuple):
    """An answer to be rewritten, so that its score is below the threshold."""

    row: Row
    threshold: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the guard did with an answer; ``text`` is to show."""

    outcome: Outcome
    text: str
    score: float | None
    threshold: float


class GuardQueues:
    """A protector that many requests use at once."""

    def __init__(self, protector: Protector, settings: QueueSettings, metrics: WorkerMetrics) -> None:
        """Set up both queues; nothing is computed before ``run``."""
        self.protector = protector
        self.metrics = metrics
        batch = self.metrics.batch
        self.scoring = BatchQueue(self._scores, _size, settings, "scoring", batch)
        self.rewriting = BatchQueue(
            self._rewrites, lambda flagged: _size(flagged.row), settings, "rewriting", batch
        )
        self.metrics.watch("scoring", lambda: self.scoring.waiting)
        self.metrics.watch("rewriting", lambda: self.rewriting.waiting)
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Compute until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.scoring.run())
            group.create_task(self.rewriting.run())

    async def guard(self, row: Row, expires: float, threshold: float | None, rewrite: bool) -> Result:
        """Score an answer, and replace it at or above the threshold (``None``: the detector's own).

        ``expires`` and errors are those of ``BatchQueue.submit``.
        """
        limit = self.protector.threshold if threshold is None else threshold
        too_long = len(row.answer) > BYTES_PER_TOKEN * self.protector.max_answer_tokens
        score = Outcome.TOO_LONG if too_long else await self.scoring.submit(row, expires)
        if not isinstance(score, float):
            made = TOO_LONG if score == Outcome.TOO_LONG else FAILED
            return Result(made.outcome, made.text, None, limit)
        if score < limit:
            return Result(Outcome.ALLOWED, row.answer, score, limit)
        made = await self.rewriting.submit(Flagged(row, limit), expires) if rewrite else REFUSED
        return Result(made.outcome, made.text, score, limit)

    def busy(self, now: float) -> float:
        """Seconds since the older of the two batches under way was begun; 0 if there is none."""
        return max(now - (queue.busy_since or now) for queue in (self.scoring, self.rewriting))

    def _scores(self, rows: Sequence[Row]) -> list[Score]:
        read = [index for index, row in enumerate(rows) if not self.protector.is_too_long(row.answer)]
        scores: list[Score] = [Outcome.TOO_LONG] * len(rows)
        found = scores_of(self.protector.detector, [rows[index] for index in read])
        for index, score in zip(read, found, strict=True):
            scores[index] = Outcome.GUARD_ERROR if score is None else score
        return scores

    def _rewrites(self, flagged: Sequence[Flagged]) -> list[Rewrite]:
        """A rewrite of each answer; those with one threshold are made together."""
        groups = defaultdict(list)
        for index, each in enumerate(flagged):
            groups[each.threshold].append(index)
        made = [FAILED] * len(flagged)
        for threshold, indices in groups.items():
            protector = Protector(
                _QueuedDetector(self, self._loop),
                self.protector.corrector,
                threshold,
                max_rewrites=self.protector.max_rewrites,
                max_answer_tokens=self.protector.max_answer_tokens,
            )
            queries, answers = zip(*(flagged[index].row for index in indices), strict=True)
            for index, rewrite in zip(
                indices, protector.rewrite(queries=queries, answers=answers), strict=True
            ):
                made[index] = rewrite if rewrite.text.strip() else Rewrite(prompts.REFUSAL, Outcome.REFUSED)
        return made


class _QueuedDetector:
    """The detector as the thread of rewrites sees it: its texts join the queue of scores."""

    def __init__(self, queues: GuardQueues, loop: asyncio.AbstractEventLoop) -> None:
        self._queues = queues
        self._loop = loop

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        scores = self._score([*map(Row, queries, answers)])
        return asyncio.run_coroutine_threadsafe(scores, self._loop).result()

    async def _score(self, rows: Sequence[Row]) -> list[float]:
        queue = self._queues.scoring
        scores = await asyncio.gather(*(queue.submit(row, math.inf, limited=False) for row in rows))
        if not all(isinstance(score, float) for score in scores):
            raise ValueError("a rewrite has no score")
        return [float(score) for score in scores]

    @property
    def card(self) -> Card:
        return self._queues.protector.detector.card


def _size(row: Row) -> int:
    return sum(map(size_of, row))
