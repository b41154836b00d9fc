"""What a model worker counts, for Prometheus. Fronts show it beside their own counters."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mllm_protector.serving.metrics import SECONDS

FRESH_S = 0.5
"""Seconds for which a text of all counters holds."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class WorkerMetrics:
    """The counters of one model worker, in a registry of their own."""

    def __init__(self, restarts: int = 0) -> None:
        """``restarts`` is how often the worker was started again so far."""
        self.registry = CollectorRegistry()
        prefix, registry = "mllm_protector", self.registry
        self._length = Gauge(
            f"{prefix}_queue_length", "Texts that wait for the models.", ["queue"], registry=registry
        )
        self._wait = Histogram(
            f"{prefix}_queue_wait_seconds",
            "Seconds that a text waited for its batch.",
            ["queue"],
            buckets=SECONDS,
            registry=registry,
        )
        self._rows = Histogram(
            f"{prefix}_batch_rows", "Texts in a batch.", ["queue"], buckets=ROWS, registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_batch_seconds",
            "Seconds that a batch was computed for.",
            ["queue"],
            buckets=SECONDS,
            registry=registry,
        )
        restarted = Counter(
            f"{prefix}_model_worker_restarts",
            "Starts of the model worker after the first.",
            registry=registry,
        )
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


def count_start(folder: Path) -> int:
    """How often a worker was started here before; this start is noted in the folder of its socket."""
    with (folder / "starts").open("ab") as file:
        file.write(b".")
        return file.tell() - 1
