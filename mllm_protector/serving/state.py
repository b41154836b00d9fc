"""What all requests of one front share."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from mllm_protector.serving.audit import AuditLog
from mllm_protector.serving.exchange import current
from mllm_protector.serving.guarding import Guarding
from mllm_protector.serving.judging import SHOWN, Judged
from mllm_protector.serving.last_hour import LastHour
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.settings import FrontSettings
from mllm_protector.serving.tracing import Tracing
from mllm_protector.serving.upstream import Upstream


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

    async def judged(self, work: Coroutine[Any, Any, Judged]) -> Judged:
        """What ``work`` gives, counted, timed and recorded.

        Raises:
            ApiError: as of ``work``, or it cannot be recorded.
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

    async def close(self) -> None:
        """Let go of the upstream, the audit log and the traces."""
        await self.upstream.close()
        if self.audit is not None:
            await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.tracing.close)
