"""Clocks: what a guard adds to the time of an answer."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mllm_protector.evaluation.measurements import Measurement
from mllm_protector.evaluation.models import RememberingDetector
from mllm_protector.guard.protector import Protector
from mllm_protector.protocols import Card, Detector

PERCENTILES = {"median_ms": 50, "p95_ms": 95}


def in_milliseconds(seconds: Sequence[float], prefix: str = "", **where: Any) -> Iterator[Measurement]:
    """Median and 95th percentile, as ``<prefix>median_ms`` and ``<prefix>p95_ms``; nothing of no times."""
    for metric, percentile in PERCENTILES.items() if seconds else ():
        value = round(1000 * float(np.percentile(seconds, percentile)), 3)
        yield Measurement(metric=prefix + metric, value=value, n=len(seconds), **where)


class _TimedDetector:
    """A detector that adds up its time in seconds."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.seconds = 0.0

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        start = time.perf_counter()
        try:
            return self.detector.score(queries=queries, answers=answers)
        finally:
            self.seconds += time.perf_counter() - start

    @property
    def card(self) -> Card:
        return self.detector.card


def guard_latency(arm: str, guard: Protector, rows: Sequence[tuple[str, str]]) -> list[Measurement]:
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
            wholes.append(time.perf_counter() - start)
            scoring.append(timed.seconds)
    rewriting = [whole - score for whole, score in zip(wholes, scoring, strict=True)]
    parts = (("latency_", wholes), ("detector_", scoring), ("corrector_", rewriting))
    return [row for prefix, times in parts for row in in_milliseconds(times, prefix, arm=arm)]
