"""A model worker within the test, around parts that do what the test says."""

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.protocols import Card, Corrector, Detector
from mllm_protector.serving.client import GuardClient
from mllm_protector.serving.worker import Worker
from tests.serving.builders import queue_settings

PATIENCE = 300.0
"""Seconds after which a test that waits has failed; a busy machine needs a few."""


def honest(answer: str) -> float:
    return 0.9 if "harmful" in answer else 0.1


class StubDetector:
    """Scores by a rule; ``calls`` are the answers of each call. While ``gate`` is closed it blocks."""

    def __init__(self, rule: Callable[[str], float] = honest, seconds: float = 0.0) -> None:
        self.rule = rule
        self.seconds = seconds
        self.calls: list[list[str]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def score(self, *, queries: Sequence[str], answers: Sequence[str]) -> list[float]:
        self.calls.append(list(answers))
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(PATIENCE)
        time.sleep(self.seconds)
        return [self.rule(answer) for answer in answers]

    @property
    def card(self) -> Card:
        return Card(identity={"kind": "stub"})


class StubCorrector:
    """Writes by a rule, as ``StubDetector`` scores."""

    def __init__(self, rule: Callable[[str], str] = lambda answer: "Here is a better idea.") -> None:
        self.rule = rule
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def correct(self, *, queries: Sequence[str], answers: Sequence[str], attempt: int = 0) -> list[str]:
        self.calls.append(list(answers))
        assert self.gate.wait(PATIENCE)
        return [self.rule(answer) for answer in answers]

    @property
    def card(self) -> Card:
        return Card(identity={"kind": "stub"})


@dataclass
class Running:
    """A worker that runs, and a client that is ready."""

    worker: Worker
    client: GuardClient
    path: Path
    stop: asyncio.Event
    serving: "asyncio.Task[None]"


@asynccontextmanager
async def running(
    detector: Detector, corrector: Corrector | None = None, *, threshold: float = 0.5, **changes: Any
) -> AsyncIterator[Running]:
    """A worker and its client; ``changes`` are of ``queue_settings``."""
    settings = queue_settings(**changes)
    worker = Worker(Protector(detector, corrector or Refusal(), threshold), settings)
    stop, started = asyncio.Event(), asyncio.Event()
    with socket_folder() as folder:
        path = folder / "guard.sock"
        serving = asyncio.create_task(worker.serve(str(path), stop, started.set))
        await started.wait()
        try:
            async with connected(path, **changes) as client:
                yield Running(worker, client, path, stop, serving)
        finally:
            for part in (detector, corrector):  # a test that failed may have left it blocked
                if isinstance(part, StubDetector | StubCorrector):
                    part.gate.set()
            stop.set()
            await asyncio.wait_for(serving, PATIENCE)


@asynccontextmanager
async def connected(path: Path, **changes: Any) -> AsyncIterator[GuardClient]:
    """A client that is ready."""
    async with GuardClient(path, queue_settings(**changes), reconnect_s=0.2) as client:
        await until(lambda: client.ready)
        yield client


class socket_folder:  # noqa: N801 - used as a function
    """A folder with a short name: that of a socket must have less than 104 letters."""

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(prefix="guard-"))
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait for something that happens elsewhere."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
