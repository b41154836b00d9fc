"""What the guard adds to the time of one answer: measured alone, one answer at a time, as a server would."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_protector.guard.protector import Protector
from mllm_protector.protocols import Corrector, Detector


class _TimedDetector:
    """A detector that adds up how long it works."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.seconds = 0.0

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        start = time.perf_counter()
        try:
            return self._detector.score(queries=queries, answers=answers)
        finally:
            self.seconds += time.perf_counter() - start

    def identity(self) -> dict[str, Any]:
        return self._detector.identity()


def measure_latency(
    detector: Detector, corrector: Corrector, threshold: float, rows: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Guard answers one by one with a clock.

    Args:
        detector: scores them (and each rewrite).
        corrector: rewrites what scores at or above the threshold.
        threshold: in [0, 1].
        rows: (query, answer), at least one.

    Returns:
        ``n``, and the median and the 95th percentile of the whole (``median_ms``, ``p95_ms``), of the
        detector (``detector_median_ms``, ...) and of the rest, which is the corrector's
        (``corrector_median_ms``, ...), in milliseconds. Answers that are passed on cost the corrector nothing
        and count as such.
    """
    timed = _TimedDetector(detector)
    protector = Protector(timed, corrector, threshold)
    wholes, scoring = [], []
    for number, (query, answer) in enumerate([rows[0], *rows]):  # the first one warms up
        timed.seconds, start = 0.0, time.perf_counter()
        protector.guard(queries=[query], answers=[answer])
        if number:
            wholes.append(1000 * (time.perf_counter() - start))
            scoring.append(1000 * timed.seconds)
    rewriting = [whole - score for whole, score in zip(wholes, scoring, strict=True)]
    figures: dict[str, float] = {"n": len(rows)}
    for name, times in (("", wholes), ("detector_", scoring), ("corrector_", rewriting)):
        figures[f"{name}median_ms"] = round(float(np.median(times)), 3)
        figures[f"{name}p95_ms"] = round(float(np.percentile(times, 95)), 3)
    return figures
