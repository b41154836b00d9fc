"""Any number of front processes that share one port, and what they count."""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from prometheus_client import multiprocess

from mllm_protector.errors import InputError
from mllm_protector.serving.child import Child
from mllm_protector.serving.front import COUNTERS, Setup
from mllm_protector.serving.settings import RestartSettings

COMMAND = (sys.executable, "-m", "mllm_protector.serving.front")

SPARE_S = 5.0
"""Seconds that a front gets beyond ``grace_s`` to end what it has cut off."""


class Fronts:
    """Front processes that are there while the context lasts.

    They accept connections from one socket, so that those of a front that dies before it accepts them go to
    another. Their counters lie in a temporary folder, where each of them finds those of all.
    """

    def __init__(
        self,
        count: int,
        listening: socket.socket,
        setup: Setup,
        restart: RestartSettings,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Set them up; nothing is started yet.

        Args:
            count: how many.
            listening: as of ``bound``; it is closed in the end.
            setup: what each gets.
            restart: when a front that died is started again.
            command: starts a front; it gets the number of the socket.
        """
        self._listening = listening
        self._folder = Path(tempfile.mkdtemp(prefix="mllm-protector-metrics-"))
        self._fronts = [
            Child(
                f"front {number} of {count}",
                (*command, str(listening.fileno())),
                restart,
                stop_s=setup.settings.grace_s + SPARE_S,
                line=setup.line,
                environment={**os.environ, COUNTERS: str(self._folder)},
                descriptors=[listening.fileno()],
                ended=self._forget,
            )
            for number in range(1, count + 1)
        ]

    async def __aenter__(self) -> Self:
        """Start all, and wait until they answer.

        Raises:
            RunError: as of ``Child.start``.
        """
        try:
            started = await asyncio.gather(*(front.start() for front in self._fronts), return_exceptions=True)
            for error in started:
                if error is not None:
                    raise error
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take no new connections, and let all finish what is under way."""
        self._listening.close()
        try:
            await asyncio.gather(*(front.stop() for front in self._fronts))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def tell(self, setup: Setup) -> None:
        """Give all fronts other settings."""
        for front in self._fronts:
            front.tell(setup.line)

    def _forget(self, pid: int) -> None:
        """Drop what a dead front counted as being under way; its other counts stay."""
        multiprocess.mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(f"host={host} port={port}: {error.strerror}") from None
    return listening
