"""What fronts count, for Prometheus. No label comes from a client, so no text can get into it.

Where the environment variable ``PROMETHEUS_MULTIPROC_DIR`` names a folder, every front gives the sum of all
fronts whose counters lie there, also of those that have died. A gauge must say how it is summed.
"""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SCORES = tuple(tenth / 20 for tenth in range(1, 21))


class Metrics:
    """The counters of one front worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, registry = "mllm_protector", self.registry
        self.requests = Counter(
            f"{prefix}_requests",
            "Requests, by route and HTTP status.",
            ["route", "status"],
            registry=registry,
        )
        self.outcomes = Counter(
            f"{prefix}_outcomes",
            "Choices, by what the guard did, or would have done (mode=shadow).",
            ["outcome", "mode"],
            registry=registry,
        )
        self.scores = Histogram(
            f"{prefix}_score", "P(harmful) of raw answers.", buckets=SCORES, registry=registry
        )
        self.seconds = Histogram(
            f"{prefix}_request_seconds",
            "Seconds of a request: the upstream's answer, one window, the guard's last verdict, the first "
            "byte of a stream, and all.",
            ["part"],
            buckets=SECONDS,
            registry=registry,
        )
        self.stream_cuts = Counter(
            f"{prefix}_stream_cuts",
            "Streamed choices that ended, or would have (mode=shadow), after some of their words were out.",
            ["outcome", "mode"],
            registry=registry,
        )
        self.upstream_errors = Counter(
            f"{prefix}_upstream_errors", "Failures of the upstream, by kind.", ["kind"], registry=registry
        )
        self.released_bytes = Counter(
            f"{prefix}_released_bytes", "Bytes of answers that were sent to clients.", registry=registry
        )
        self.unscanned_bytes = Counter(
            f"{prefix}_unscanned_bytes",
            "Bytes of answers that were sent to clients without a verdict; 0 unless streaming is off "
            "or shadow is on.",
            registry=registry,
        )
        self.clients_gone = Counter(
            f"{prefix}_clients_gone", "Requests whose client left before the answer.", registry=registry
        )
        self.audit_errors = Counter(
            f"{prefix}_audit_errors", "Answers that could not be recorded.", registry=registry
        )
        self.under_way = Gauge(
            f"{prefix}_requests_under_way",
            "Requests being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.guard_ready = Gauge(
            f"{prefix}_guard_ready",
            "1 if the guard answers.",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )

    def exposition(self) -> bytes:
        """All counters as Prometheus reads them."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
