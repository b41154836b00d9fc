"""The process that holds the models: it answers lines of JSON on a unix socket.

    {"id": 7, "op": "guard", "query": "...", "answer": "...", "threshold": null, "rewrite": true, "within": 9}
    {"id": 7, "outcome": "allowed", "text": "...", "score": 0.02, "threshold": 0.5, "seconds": 0.013}

``op`` is ``guard`` or ``ping``. ``within`` are the seconds after which nobody waits for the reply any more. A
request that has no result gets ``error``: ``malformed``, ``overloaded`` (with ``retry_after``), ``expired``,
``failed`` or ``stopping``. A line over the limit ends its connection. Replies come in any order.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mllm_protector.arguments import require_threshold
from mllm_protector.errors import InputError
from mllm_protector.guard.protector import Protector
from mllm_protector.guard.rows import Row
from mllm_protector.serving import logs
from mllm_protector.serving.child import HUNG, end_if_hung, parent_told
from mllm_protector.serving.guard_queues import GuardQueues
from mllm_protector.serving.loading import load
from mllm_protector.serving.metrics import WorkerMetrics
from mllm_protector.serving.queueing import ExpiredError, FullError
from mllm_protector.serving.settings import MEGABYTE, GuardSettings, QueueSettings

log = logging.getLogger(__name__)

LAST_WORDS = 2.0
"""Seconds that a client may take to read its last replies."""


class Request(NamedTuple):
    """A request for the guard."""

    row: Row
    threshold: float | None
    rewrite: bool
    within: float


class Worker:
    """Serves a guard to any number of connections, each with any number of requests at once."""

    def __init__(self, protector: Protector, settings: QueueSettings, restarts: int = 0) -> None:
        """Set it up within a running event loop; ``restarts`` is how often it was started again."""
        self.queues = GuardQueues(protector, settings, WorkerMetrics(restarts))
        self._settings = settings
        self._under_way: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._stopping = False

    async def serve(self, path: str, stop: asyncio.Event, started: Callable[[], None] = lambda: None) -> None:
        """Serve until ``stop`` is set; then finish what is under way and refuse what is new.

        ``started`` is called when connections are accepted.
        """
        limit = int(self._settings.request_mb * MEGABYTE)
        server = await asyncio.start_unix_server(self._converse, path, limit=limit)
        computing = asyncio.create_task(self.queues.run())
        stopped = asyncio.create_task(stop.wait())
        started()
        try:
            await asyncio.wait((computing, stopped), return_when=asyncio.FIRST_COMPLETED)
            if computing.done():
                computing.result()  # it only ends by a fault of ours
            server.close()
            self._stopping = True
            if self._under_way:
                await asyncio.wait(self._under_way)
            await self._hang_up()
        finally:
            server.close()
            for task in (computing, stopped):
                task.cancel()
            await asyncio.gather(computing, stopped, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                await writer.drain()  # who does not read replies is not read either
                task = asyncio.create_task(self._reply(line, writer))
                for group in (tasks, self._under_way):
                    group.add(task)
                    task.add_done_callback(group.discard)
        except ValueError:
            log.warning("a line is longer than request_mb=%s; its connection ends", self._settings.request_mb)
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._writers.discard(writer)
            writer.close()

    async def _hang_up(self) -> None:
        """Close all connections once their replies are sent."""
        writers = [*self._writers]
        for writer in writers:
            writer.close()
        closing = [asyncio.ensure_future(writer.wait_closed()) for writer in writers]
        if closing:
            await asyncio.wait(closing, timeout=LAST_WORDS)

    async def _reply(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        reply = await self._answer(line)
        text = json.dumps(reply, ensure_ascii=False, allow_nan=False) + "\n"
        writer.write(text.encode(errors="surrogatepass"))

    async def _answer(self, line: bytes) -> dict[str, Any]:
        started = time.monotonic()
        number: int | None = None
        try:
            content = json.loads(line)
            number = _number(content)
            request = None if content.get("op") == "ping" else _request(content)
        except (InputError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, InputError) else "not JSON"
            return {"id": number, "error": "malformed", "message": reason}
        if request is None:
            return {"id": number, **self._state(started)}
        if self._stopping:
            return {"id": number, "error": "stopping"}
        expires = started + min(request.within, self._settings.deadline_s)
        found: dict[str, Any]
        try:
            found = asdict(await self.queues.guard(request.row, expires, request.threshold, request.rewrite))
        except FullError as full:
            found = {"error": "overloaded", "retry_after": round(full.retry_after, 3)}
        except ExpiredError:
            found = {"error": "expired"}
        except Exception as error:
            log.error("a request failed (%s)", type(error).__name__)
            found = {"error": "failed"}
        return {"id": number, **found, "seconds": round(time.monotonic() - started, 6)}

    def _state(self, now: float) -> dict[str, Any]:
        return {
            "ready": not self._stopping,
            "threshold": self.queues.protector.threshold,
            "promise": promise_of(self.queues.protector),
            "busy_seconds": round(self.queues.busy(now), 3),
            "scoring_waiting": self.queues.scoring.waiting,
            "rewriting_waiting": self.queues.rewriting.waiting,
            "metrics": self.queues.metrics.exposition(),
        }


def _number(content: Any) -> int:
    number = content.get("id") if isinstance(content, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError("id: must be a whole number")
    return number


def _request(content: dict[str, Any]) -> Request:
    if content.get("op") != "guard":
        raise InputError("op: must be guard or ping")
    for key in ("query", "answer"):
        if not isinstance(content.get(key), str):
            raise InputError(f"{key}: must be a text")
    within = content.get("within")
    if not isinstance(within, int | float) or isinstance(within, bool) or not 0 < within < float("inf"):
        raise InputError("within: must be a number above 0")
    threshold, rewrite = content.get("threshold"), content.get("rewrite", True)
    if threshold is not None:
        require_threshold("threshold", threshold)
    if not isinstance(rewrite, bool):
        raise InputError("rewrite: must be true or false")
    return Request(Row(content["query"], content["answer"]), threshold, rewrite, float(within))


def promise_of(protector: Protector) -> str | None:
    """How the detector's threshold was chosen, in one sentence; ``None`` where it has no ``guard.json``."""
    how: str | None = getattr(getattr(protector.detector, "guard", None), "threshold_how", None)
    return how


def main(arguments: Sequence[str], load: Callable[[GuardSettings], Protector] = load) -> int:
    """Serve until SIGTERM, or until the standard input ends because the supervisor is gone.

    Args:
        arguments: the path of the socket, and the settings as JSON (see ``running``). "ready" is written
            to the standard output when connections are accepted.
        load: makes the protector.
    """
    path, settings = arguments[0], json.loads(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the supervisor decides
    logs.configure("model worker")
    restarts = _count_start(Path(path).parent)
    started = parent_told()
    try:
        protector = load(GuardSettings(**settings["guard"]))
    except InputError as error:
        log.error("error: %s", error)
        return error.exit_code
    queue = QueueSettings(**settings["queue"])
    asyncio.run(_run(partial(Worker, protector, queue, restarts), path, settings["hang_s"], started))
    return 0


def _count_start(folder: Path) -> int:
    """How often a worker was started here before; this start is noted in the folder of its socket."""
    with (folder / "starts").open("ab") as file:
        file.write(b".")
        return file.tell() - 1


async def _run(make: Callable[[], Worker], path: str, hang_s: float, started: Callable[[], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    threading.Thread(target=_until_alone, args=(loop, stop), daemon=True).start()
    end_if_hung(loop, hang_s)
    worker = make()
    watching = asyncio.create_task(_watch(worker.queues, hang_s))
    try:
        await worker.serve(path, stop, started)
    finally:
        watching.cancel()


def _until_alone(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(0, 1024):
        pass
    loop.call_soon_threadsafe(stop.set)


async def _watch(queues: GuardQueues, hang_s: float) -> None:
    while True:
        await asyncio.sleep(min(1.0, hang_s / 4))
        if queues.busy(time.monotonic()) > hang_s:
            log.critical("a batch has taken longer than hang_s=%s; the worker ends", hang_s)
            os._exit(HUNG)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # to take PyTorch apart takes seconds, and its supervisor waits
