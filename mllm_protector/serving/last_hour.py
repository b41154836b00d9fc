"""What one front did in the last hour: outcomes per minute and latencies, for its page."""

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

MINUTES = 60
LATEST = 2000
"""Requests whose latencies are kept."""


class LastHour:
    """Counts of one front, in its memory alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._counts: dict[int, Counter[str]] = {}
        self._seconds: dict[str, deque[tuple[float, float]]] = {}

    def add(self, outcome: str) -> None:
        """Count a choice."""
        minute = self._minute()
        if minute not in self._counts:
            self._counts = {old: each for old, each in self._counts.items() if old > minute - MINUTES}
        self._counts.setdefault(minute, Counter())[outcome] += 1

    def took(self, part: str, seconds: float) -> None:
        """Keep the latency of a part of a request."""
        self._seconds.setdefault(part, deque(maxlen=LATEST)).append((self._clock(), seconds))

    def minutes(self) -> list[dict[str, int]]:
        """Counts by outcome of each of the last 60 minutes, the running one last."""
        last = self._minute()
        return [dict(self._counts.get(minute, Counter())) for minute in range(last - MINUTES + 1, last + 1)]

    def latencies(self) -> dict[str, dict[str, Any]]:
        """Of each part, the median and 95th percentile in seconds, and the number they are of."""
        start = self._clock() - 60 * MINUTES
        found = {}
        for part, rows in self._seconds.items():
            seconds = sorted(each for when, each in rows if when > start)
            if seconds:
                at = [seconds[min(int(share * len(seconds)), len(seconds) - 1)] for share in (0.5, 0.95)]
                found[part] = {"p50": round(at[0], 6), "p95": round(at[1], 6), "count": len(seconds)}
        return found

    def _minute(self) -> int:
        return int(self._clock() // 60)
