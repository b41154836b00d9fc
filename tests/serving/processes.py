"""``python scripts/serve.py`` as a user starts it: a process with its children, on loopback."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.serving import stubs
from tests.serving.fakes import HTTP

ROOT = Path(__file__).parents[2]


class Server:
    """A server that runs.

    Attributes:
        url: where clients come in.
        process: the main one.
        temporary: where it makes its temporary folders.
    """

    def __init__(self, folder: Path, temporary: Path, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = temporary
        self._log = folder / "log"
        given = [f"port={self.port}", "restart.after_s=0.1", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "scripts" / "serve.py", *given],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        """All that the processes have said."""
        return self._log.read_text(errors="replace")

    @property
    def fronts(self) -> list[psutil.Process]:
        """Those that answer clients, in the order of their start."""
        return self._children("serving.front")

    @property
    def worker(self) -> psutil.Process:
        """The one with the models."""
        [found] = self._children("serving.worker")
        return found

    def _children(self, module: str) -> list[psutil.Process]:
        """Its children that run a module."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if any(module in word for word in child.cmdline()):
                    found.append(child)
            except psutil.Error:  # it has just ended
                continue
        return sorted(found, key=lambda child: child.create_time())

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until the log has ``words``."""
        until(lambda: self.log.count(words) >= count or self.process.poll() is not None)
        assert self.log.count(words) >= count, self.log

    def ask(self, text: str, **more: Any) -> Any:
        """The response to a question."""
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
        return HTTP.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def count(self, name: str) -> float:
        """The sum of a metric over its labels, as any front says it."""
        text = HTTP.get(f"{self.url}/metrics").text
        values = re.findall(rf"^mllm_protector_{name}(?:{{.*}})? (\S+)$", text, flags=re.MULTILINE)
        return sum(map(float, values))

    @contextmanager
    def only(self, front: psutil.Process) -> Iterator[None]:
        """Only one front goes on."""
        others = [each for each in self.fronts if each != front]
        for each in others:
            each.suspend()
        try:
            yield
        finally:
            for each in others:
                each.resume()

    def end(self) -> int:
        """Tell it to stop; gives its exit code. Its children end in any case."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(stubs.PATIENCE)
        finally:
            self.process.kill()


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server that answers, with ``folder`` as its working directory."""
    with stubs.socket_folder() as temporary:
        server = Server(folder, temporary, [*arguments])
        try:
            server.wait_for("is guarded")
            yield server
        finally:
            server.end()


def until(condition: Callable[[], Any]) -> None:
    """``stubs.until`` outside of an event loop."""
    asyncio.run(stubs.until(condition))
