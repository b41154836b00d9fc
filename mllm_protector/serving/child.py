"""Keeps one process running: starts it, starts it again when it dies, and stops it in the end."""

import asyncio
import logging
import os
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from mllm_protector.errors import RunError
from mllm_protector.serving.settings import RestartSettings

log = logging.getLogger(__name__)


class Child:
    """A process that writes "ready" to its standard output when it is.

    Its standard input ends when this process does, however it ends; then it has to end too.

    Attributes:
        restarts: how often it was started again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        restart: RestartSettings,
        *,
        stop_s: float,
        line: bytes = b"",
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
        ended: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """Set it up; nothing is started yet.

        Args:
            name: for messages.
            command: what is started.
            restart: how long it may take, and when it is started again.
            stop_s: the longest that it may finish what is under way when it is told to stop.
            line: the first line of its standard input.
            environment: of the process; ``None`` for that of this one.
            descriptors: that it inherits.
            ended: gets the number of each process that has ended.
        """
        self._name = name
        self._command = command
        self._restart = restart
        self._stop_s = stop_s
        self._line = line
        self._environment = environment
        self._descriptors = descriptors
        self._ended = ended
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The running process; ``None`` while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            RunError: it ended, or was not ready in time; its own message is on the standard error.
        """
        try:
            await self._begin()
        except BaseException:
            await self._end()
            raise
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Let it finish what is under way; it is killed when its time is over, or this is cancelled."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._end()

    def tell(self, line: bytes) -> None:
        """Write a line to the process, and to each that takes its place."""
        self._line = line
        if self._process is not None and self._process.stdin is not None and self.pid is not None:
            self._process.stdin.write(line)

    async def _begin(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            env=self._environment,
            pass_fds=self._descriptors,
        )
        self._process = process
        self.tell(self._line)
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            said = await asyncio.wait_for(process.stdout.readline(), self._restart.start_s)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise RunError(f"{self._name} was not ready within start_s={self._restart.start_s}") from None
        if said != READY:
            code = await process.wait()
            raise RunError(f"{self._name} ended with exit code {code} before it was ready")
        log.info("%s is ready (process %d)", self._name, process.pid)

    async def _watch(self) -> None:
        wait = self._restart.after_s
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            self._ended(self._process.pid)
            if time.monotonic() - started > self._restart.at_most_s:
                wait = self._restart.after_s
            why = f"{code}: it hung for {self._restart.hang_s:g} s" if code == HUNG else code
            log.error("%s ended (%s); it starts again in %.1f s", self._name, why, wait)
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._restart.at_most_s)
            self.restarts += 1
            try:
                await self._begin()
            except (RunError, OSError) as error:
                log.error("%s", error)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_s)
        except TimeoutError:
            log.error("%s did not stop within %g s; it is killed", self._name, self._stop_s)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


READY = b"ready\n"

HUNG = 70
"""The exit code of a process that ends itself because it hangs."""


def parent_told() -> Callable[[], None]:
    """In a child: what tells the parent that it is ready. All that it prints goes to the standard error."""
    output = os.dup(1)
    os.dup2(2, 1)

    def tell() -> None:
        os.write(output, READY)
        os.close(output)

    return tell


def end_if_hung(loop: asyncio.AbstractEventLoop, hang_s: float) -> None:
    """From now on this process ends when its event loop takes no turn for ``hang_s`` seconds."""

    def watch() -> None:
        while not loop.is_closed():
            turned = threading.Event()
            with suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(turned.set)
            if not turned.wait(hang_s) and not loop.is_closed():
                os._exit(HUNG)  # without a word: what hangs may be the log
            time.sleep(min(1.0, hang_s / 4))

    threading.Thread(target=watch, daemon=True).start()
