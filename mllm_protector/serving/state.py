"""What all requests of one front share."""

import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from mllm_protector.serving.guarding import Guarding
from mllm_protector.serving.judging import SHOWN, Judged
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.settings import FrontSettings
from mllm_protector.serving.upstream import Upstream


@dataclass(slots=True)
class State:
    """The parts of a front."""

    settings: FrontSettings
    guard: Guarding
    upstream: Upstream
    metrics: Metrics

    async def judged(self, work: Coroutine[Any, Any, Judged]) -> Judged:
        """What ``work`` gives, counted and timed."""
        started = time.perf_counter()
        result = await work
        self.metrics.seconds.labels("guard").observe(time.perf_counter() - started)
        for verdict in result.verdicts:
            mode = "shadow" if result.shadow else "enforce"
            self.metrics.outcomes.labels(SHOWN[verdict.outcome], mode).inc()
            if verdict.score is not None:
                self.metrics.scores.observe(verdict.score)
        return result

    def released(self, size: int, *, unscanned: bool = False) -> None:
        """Count bytes of an answer that go to a client."""
        self.metrics.released_bytes.inc(size)
        if unscanned:
            self.metrics.unscanned_bytes.inc(size)
