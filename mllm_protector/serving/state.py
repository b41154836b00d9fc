"""What all requests of one front share, and what it tells of itself: ``GET /state``, which the page shows."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from mllm_protector.serving.audit import AuditLog
from mllm_protector.serving.exchange import current
from mllm_protector.serving.guarding import Guarding
from mllm_protector.serving.judging import SHOWN, Judged
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.settings import FrontSettings
from mllm_protector.serving.tracing import Tracing
from mllm_protector.serving.upstream import Upstream

MINUTES = 60
LATEST = 2000
"""Requests whose latencies are kept."""

CHECKED_S = 5.0
"""Seconds for which an answer about the upstream holds."""


class LastHour:
    """Outcomes per minute and latencies of one front in the last hour, in its memory alone."""

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


@dataclass(slots=True)
class State:
    """The parts of a front."""

    settings: FrontSettings
    guard: Guarding
    upstream: Upstream
    metrics: Metrics
    tracing: Tracing
    audit: AuditLog | None
    hour: LastHour = field(default_factory=LastHour)
    _reachable: bool = False
    _checked: float = float("-inf")

    async def judged(self, work: Coroutine[Any, Any, Judged]) -> Judged:
        """What ``work`` gives, counted, timed and recorded.

        Raises:
            ApiError: as in ``work``, or it cannot be recorded.
        """
        started = time.perf_counter()
        with self.tracing.part("guard"):
            result = await work
        self.took("guard", time.perf_counter() - started)
        current().outcome = result.header
        for verdict in result.verdicts:
            mode = "shadow" if result.shadow else "enforce"
            self.metrics.outcomes.labels(SHOWN[verdict.outcome], mode).inc()
            self.hour.add(SHOWN[verdict.outcome])
            if verdict.score is not None:
                self.metrics.scores.observe(verdict.score)
        if self.audit is not None:
            await self.audit.write(result, self.guard.state.get("threshold"))
        return result

    def took(self, part: str, seconds: float) -> None:
        """Count the seconds of a part of a request."""
        self.metrics.seconds.labels(part).observe(seconds)
        self.hour.took(part, seconds)

    def released(self, size: int, *, unscanned: bool = False) -> None:
        """Count bytes of an answer that go to a client."""
        self.metrics.released_bytes.inc(size)
        if unscanned:
            self.metrics.unscanned_bytes.inc(size)

    async def overview(self, trusted: bool) -> dict[str, Any]:
        """All for a client that is ``trusted``; for others whether the parts answer, and counts.

        The upstream is asked now and then, whoever asks however often.
        """
        if time.monotonic() - self._checked > CHECKED_S:
            self._checked = time.monotonic()
            self._reachable = await self.upstream.reachable({})
        found: dict[str, Any] = {
            "guard_ready": self.guard.ready,
            "upstream_reachable": self._reachable,
            "keys_required": bool(self.settings.keys),
            "minutes": self.hour.minutes(),
        }
        if trusted:
            policy = self.settings.policy
            names = ("streaming", "on_flag", "on_error", "shadow")
            shown = {name: getattr(policy, name) for name in names}
            found |= {"latencies": self.hour.latencies(), **self._guard(), "policy": shown}
        return found

    async def close(self) -> None:
        """Let go of the upstream, the audit log and the traces."""
        await self.upstream.close()
        if self.audit is not None:
            await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.tracing.close)

    def _guard(self) -> dict[str, Any]:
        """The threshold in force and, where it is the detector's own, what it was chosen for."""
        said, policy = self.guard.state, self.settings.policy
        own = policy.threshold is None
        return {
            "threshold": said.get("threshold") if own else policy.threshold,
            "threshold_of": "detector" if own else "config",
            "promise": said.get("promise") if own else None,
            "other_thresholds": len(policy.model_thresholds) + len(policy.key_thresholds),
            "waiting": {name: said.get(f"{name}_waiting") for name in ("scoring", "rewriting")},
        }
