"""What fronts and the model worker count, for Prometheus. No label and no text comes from a client.

Where the environment variable ``PROMETHEUS_MULTIPROC_DIR`` names a folder, every front gives the sum of all
fronts whose counters lie there, also of those that have died. A gauge must say how it is summed.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SCORES = tuple(tenth / 20 for tenth in range(1, 21))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

FRESH_S = 0.5
"""Seconds for which a text of all counters of the model worker holds."""


class Metrics:
    """The counters of one front, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mllm_protector", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by route and HTTP status.", ["route", "status"], **own)
        self.outcomes = Counter(
            "outcomes",
            "Choices, by what the guard did, or would have done (mode=shadow).",
            ["outcome", "mode"],
            **own,
        )
        self.scores = Histogram("score", "P(harmful) of raw answers.", buckets=SCORES, **own)
        self.seconds = Histogram(
            "request_seconds",
            "Seconds of a request: the upstream's answer, one window, the guard's last verdict, the first "
            "byte of a stream, and all.",
            ["part"],
            buckets=SECONDS,
            **own,
        )
        self.stream_cuts = Counter(
            "stream_cuts",
            "Streamed choices that ended, or would have (mode=shadow), after some of their words were out.",
            ["outcome", "mode"],
            **own,
        )
        self.upstream_errors = Counter(
            "upstream_errors", "Failures of the upstream, by kind.", ["kind"], **own
        )
        self.released_bytes = Counter("released_bytes", "Bytes of answers that were sent to clients.", **own)
        self.unscanned_bytes = Counter(
            "unscanned_bytes",
            "Bytes of answers that were sent to clients without a verdict; 0 unless streaming is off "
            "or shadow is on.",
            **own,
        )
        self.clients_gone = Counter("clients_gone", "Requests whose client left before the answer.", **own)
        self.audit_errors = Counter("audit_errors", "Answers that could not be recorded.", **own)
        self.under_way = Gauge(
            "requests_under_way", "Requests being answered.", multiprocess_mode="livesum", **own
        )
        self.guard_ready = Gauge(
            "guard_ready", "1 if the guard answers.", multiprocess_mode="livemostrecent", **own
        )

    def exposition(self) -> bytes:
        """All counters as Prometheus reads them."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class WorkerMetrics:
    """The counters of one model worker, in a registry of their own; fronts show them beside theirs."""

    def __init__(self, restarts: int = 0) -> None:
        """``restarts`` is how often the worker was started again so far."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mllm_protector", "registry": self.registry}
        by_queue = own | {"labelnames": ["queue"]}
        self._length = Gauge("queue_length", "Texts that wait for the models.", **by_queue)
        self._wait = Histogram(
            "queue_wait_seconds", "Seconds that a text waited for its batch.", buckets=SECONDS, **by_queue
        )
        self._rows = Histogram("batch_rows", "Texts in a batch.", buckets=ROWS, **by_queue)
        self._seconds = Histogram(
            "batch_seconds", "Seconds that a batch was computed for.", buckets=SECONDS, **by_queue
        )
        restarted = Counter("model_worker_restarts", "Starts of the model worker after the first.", **own)
        restarted.inc(restarts)
        self._text = ""
        self._written = -math.inf

    def watch(self, queue: str, length: Callable[[], int]) -> None:
        """Show the length of a queue from now on."""
        self._length.labels(queue).set_function(length)

    def batch(self, queue: str, waits: Sequence[float], seconds: float) -> None:
        """Count a batch: the seconds that each of its texts waited, and those of its computing."""
        self._rows.labels(queue).observe(len(waits))
        self._seconds.labels(queue).observe(seconds)
        for wait in waits:
            self._wait.labels(queue).observe(wait)

    def exposition(self) -> str:
        """All counters as Prometheus reads them, half a second old at most: many fronts may ask for them."""
        if time.monotonic() - self._written > FRESH_S:
            self._text = generate_latest(self.registry).decode()
            self._written = time.monotonic()
        return self._text
