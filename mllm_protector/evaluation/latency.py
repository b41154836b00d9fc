"""What the guard adds to the time of one answer: measured alone, one answer at a time, as a server would."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_protector.evaluation.measurements import Measurement
from mllm_protector.guard.protector import Protector
from mllm_protector.protocols import Detector


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
    arm: str, detector: Detector, guard: Protector, rows: Sequence[tuple[str, str]]
) -> list[Measurement]:
    """Guard answers one by one with a clock.

    Args:
        arm: whose guard it is.
        detector: the guard's own, which remembers no score.
        guard: the guard.
        rows: (query, answer); none measures nothing.

    Returns:
        ``latency_median_ms`` and ``latency_p95_ms`` of the whole, of the detector (``detector_median_ms``,
        ...) and of the rest, which is the corrector's. An answer that passes costs the corrector nothing
        and counts as such.
    """
    timed = _TimedDetector(detector)
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
