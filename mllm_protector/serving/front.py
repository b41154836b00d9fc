"""A process that answers clients: it accepts connections from a socket that it inherits.

Its standard input has lines of JSON, a ``Setup`` each: the first one at its start, others when the settings
change. When that ends, or at SIGTERM, it finishes what is under way and ends.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import uvicorn
from pydantic import TypeAdapter

from mllm_protector.errors import InputError
from mllm_protector.serving import logs
from mllm_protector.serving.child import end_if_hung, parent_told
from mllm_protector.serving.client import GuardClient
from mllm_protector.serving.proxy import Front
from mllm_protector.serving.settings import MEGABYTE, FrontSettings, QueueSettings, Seconds

log = logging.getLogger(__name__)

COUNTERS = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable with the folder of the counters of all fronts."""

CONNECTED_S = 5.0
"""The longest wait for the model worker before a front accepts connections."""

LONGEST_LINE = 16 * MEGABYTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a front process gets.

    Attributes:
        path: of the model worker's socket.
        queue: of the model worker.
        hang_s: after so many seconds without a turn of its event loop it ends.
        settings: its own.
    """

    path: str
    queue: QueueSettings
    hang_s: Seconds
    settings: FrontSettings

    @property
    def line(self) -> bytes:
        """It as a line of JSON."""
        return SETUP.dump_json(self) + b"\n"


SETUP = TypeAdapter(Setup)


class _Server(uvicorn.Server):
    """Leaves signals alone, and tells when it accepts connections."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    def stop(self) -> None:
        self.should_exit = True


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM, or until the standard input ends because the supervisor is gone.

    Args:
        arguments: the number of the socket. "ready" is written to the standard output when connections are
            accepted.
    """
    for each in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the supervisor decides
        signal.signal(each, signal.SIG_IGN)
    logs.configure("front")
    try:
        asyncio.run(_run(socket.socket(fileno=int(arguments[0])), parent_told()))
    except InputError as error:
        log.error("error: %s", error)
        return error.exit_code
    return 0


async def _run(listening: socket.socket, started: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    setup = SETUP.validate_json(await reader.readline())
    settings = setup.settings
    end_if_hung(loop, setup.hang_s)
    async with GuardClient(setup.path, setup.queue, reconnect_s=settings.reconnect_s) as client:
        front = Front(settings, client)
        config = uvicorn.Config(
            front.app(),
            log_config=None,
            access_log=False,  # its lines hold paths and queries
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(settings.grace_s)),
        )
        server = _Server(config, started)
        loop.add_signal_handler(signal.SIGTERM, server.stop)
        obeying = asyncio.create_task(_obey(reader, front))
        obeying.add_done_callback(lambda _: server.stop())
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECTED_S):
                while not client.ready:
                    await asyncio.sleep(0.01)
        await server.serve(sockets=[listening])
        obeying.cancel()


async def _obey(reader: asyncio.StreamReader, front: Front) -> None:
    while line := await reader.readline():
        front.apply(SETUP.validate_json(line).settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
