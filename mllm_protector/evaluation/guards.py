"""The guards of an evaluation: loaded once, sharing one detector, and measured with a clock."""

import time
from collections.abc import Sequence

import numpy as np

from mllm_protector.evaluation.grid import NONE
from mllm_protector.evaluation.measurements import Measurement
from mllm_protector.files import content_key
from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.models.detector import load_detector
from mllm_protector.models.shared import load_parts
from mllm_protector.protocols import Card, Corrector, Detector


def load_protectors(
    arms: Sequence[str],
    detector: str,
    detoxifier: str,
    base: str | None,
    threshold: float | None,
    rewrite_tokens: int,
) -> dict[str, Protector]:
    """The guard of each arm; they share a detector, which scores no answer twice."""
    if set(arms) == {NONE}:
        return {}
    correctors: dict[str, Corrector] = {"refusal": Refusal()}
    if "protector" not in arms:
        scorer = load_detector(detector, base=base)
    else:
        scorer, correctors["protector"] = load_parts(
            detector, detoxifier, base=base, max_new_tokens=rewrite_tokens
        )
    limit = scorer.threshold if threshold is None else threshold
    remembering = RememberingDetector(scorer)
    return {arm: Protector(remembering, correctors[arm], limit) for arm in arms if arm != NONE}


class RememberingDetector:
    """Scores no (query, answer) twice, so that a second arm costs only its rewrites."""

    def __init__(self, detector: Detector) -> None:
        """Wrap a detector."""
        self.detector = detector
        self._scores: dict[str, float] = {}

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        """As the detector's own."""
        rows = {content_key(*row): row for row in zip(queries, answers, strict=True)}
        new = [key for key in rows if key not in self._scores]
        if new:
            scores = self.detector.score(
                queries=[rows[key][0] for key in new], answers=[rows[key][1] for key in new]
            )
            self._scores.update(zip(new, scores, strict=True))
        return [self._scores[content_key(*row)] for row in zip(queries, answers, strict=True)]

    @property
    def card(self) -> Card:
        """As the detector's own."""
        return self.detector.card


class _TimedDetector(RememberingDetector):
    """A detector that remembers no score and adds up its time in seconds."""

    seconds = 0.0

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        start = time.perf_counter()
        try:
            return self.detector.score(queries=queries, answers=answers)
        finally:
            self.seconds += time.perf_counter() - start


def measure_latency(arm: str, guard: Protector, rows: Sequence[tuple[str, str]]) -> list[Measurement]:
    """Guard (query, answer) one by one with a clock.

    Returns:
        ``latency_median_ms`` and ``latency_p95_ms`` of the whole, of the detector (``detector_median_ms``,
        ...) and of the rest, which is the corrector's. An answer that passes costs the corrector nothing
        and counts as such.
    """
    known = guard.detector
    timed = _TimedDetector(known.detector if isinstance(known, RememberingDetector) else known)
    protector = Protector(timed, guard.corrector, guard.threshold)
    wholes, scoring = [], []
    for number, (query, answer) in enumerate([*rows[:1], *rows]):  # the first one warms up
        timed.seconds, start = 0.0, time.perf_counter()
        protector.guard(queries=[query], answers=[answer])
        if number:
            wholes.append(1000 * (time.perf_counter() - start))
            scoring.append(1000 * timed.seconds)
    rewriting = [whole - score for whole, score in zip(wholes, scoring, strict=True)]
    return [
        Measurement(
            arm=arm,
            metric=f"{part}_{name}_ms",
            value=round(float(np.percentile(times, percentile)), 3),
            n=len(rows),
        )
        for part, times in (("latency", wholes), ("detector", scoring), ("corrector", rewriting))
        for name, percentile in (("median", 50), ("p95", 95))
        if times
    ]
