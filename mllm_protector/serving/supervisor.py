"""Keeps one model worker running: starts it, starts it again when it dies, and stops it in the end."""

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from mllm_protector.errors import InputError, RunError
from mllm_protector.serving.settings import GuardSettings, QueueSettings, RestartSettings

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "mllm_protector.serving.worker")

LONGEST_PATH = 100
"""Bytes of a unix socket's path; the system's limit is 104 or 108."""


class Supervisor:
    """A model worker that is there while the context lasts.

    Attributes:
        path: of the worker's socket, in a folder that only this user may enter.
        restarts: how often the worker was started again.
    """

    def __init__(
        self,
        guard: GuardSettings,
        queue: QueueSettings,
        restart: RestartSettings,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Set it up; nothing is started yet. ``command`` gets the socket's path and the settings as JSON."""
        self._restart = restart
        self._settings = json.dumps(
            {"guard": asdict(guard), "queue": asdict(queue), "hang_s": restart.hang_s}, allow_nan=False
        )
        self._command = command
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._folder: Path | None = None
        self.restarts = 0

    @property
    def path(self) -> Path:
        """The worker's socket."""
        if self._folder is None:
            raise RunError("the model worker was not started")
        return self._folder / "guard.sock"

    @property
    def pid(self) -> int | None:
        """The running worker's process; ``None`` while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def __aenter__(self) -> Self:
        """Start the worker and wait until it takes requests.

        Raises:
            RunError: it ended, or was not ready in time; its own message is on the standard error.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="mllm-protector-"))  # of mode 0700
        try:
            if len(os.fsencode(self.path)) > LONGEST_PATH:
                raise InputError(f"{self.path}: too long for a socket; set TMPDIR to a shorter path")
            await self._start()
        except BaseException:
            await self._end()
            raise
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the worker finish what is under way, for ``stop_s`` at most."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._end()

    async def _start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command, str(self.path), self._settings, stdin=PIPE, stdout=PIPE
        )
        self._process = process
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            said = await asyncio.wait_for(process.stdout.readline(), self._restart.start_s)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise RunError(f"the model worker was not ready within start_s={self._restart.start_s}") from None
        if said != b"ready\n":
            code = await process.wait()
            raise RunError(f"the model worker ended with exit code {code} before it was ready")
        log.info("the model worker is ready (process %d)", process.pid)

    async def _watch(self) -> None:
        wait = self._restart.after_s
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            if time.monotonic() - started > self._restart.at_most_s:
                wait = self._restart.after_s
            log.error("the model worker ended (%d); it starts again in %.1f s", code, wait)
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._restart.at_most_s)
            self.restarts += 1
            try:
                await self._start()
            except (RunError, OSError) as error:
                log.error("%s", error)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._restart.stop_s)
            except TimeoutError:
                log.error(
                    "the model worker did not stop within stop_s=%s; it is killed", self._restart.stop_s
                )
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
