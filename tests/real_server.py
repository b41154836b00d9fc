"""A real server of models: ``transformers serve`` in a process of its own, on loopback.

It serves any number of models: the name of a model in a request is the path of its folder.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 300.0


class RealServer:
    """A ``transformers serve`` that can be killed and started again at the same address."""

    def __init__(self, log: Path) -> None:
        """Start it and wait until it answers; ``log`` gets what it says."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        self.process = self._start()

    def answered(self) -> int:
        """How many requests it has answered in all its lives."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("POST /v1/chat/completions")

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def restart(self) -> None:
        """Start it again after ``kill``, at the same address."""
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        arguments = ["serve", "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        command = [sys.executable, "-m", "transformers.cli.transformers", *arguments]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | quiet, cwd=self.log.parent
            )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return process
            except OSError:
                time.sleep(0.1)
        process.kill()
        raise AssertionError(f"transformers serve did not start:\n{self.log.read_text(errors='replace')}")


@contextmanager
def real_server(log: Path) -> Iterator[RealServer]:
    """A server that is gone at the end, whatever happens."""
    server = RealServer(log)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
