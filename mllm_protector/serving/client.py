"""A front's connection to the model worker: many requests at once, each with a deadline.

A request is sent once. If the connection is lost its requests fail, because a text may be what killed the
worker.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mllm_protector import prompts
from mllm_protector.arguments import require_threshold
from mllm_protector.records import Outcome
from mllm_protector.serving.guarding import Guarded, GuardUnavailable, Overloaded
from mllm_protector.serving.settings import MEGABYTE, QueueSettings

log = logging.getLogger(__name__)

FIRST_WAIT = 0.05
"""Seconds before the second try to connect; doubled at each try."""

PING_EVERY = 1.0
"""Seconds between two pings."""

STALE = 5.0
"""Seconds without an answer to a ping after which the guard counts as not ready."""

OVERHEAD = 65_536
"""Bytes that a reply may have beside its text."""

ODD = "the guard gave an odd reply"


class GuardClient:
    """Asks a model worker; implements ``guarding.Guarding``. Use it as an asynchronous context manager."""

    def __init__(self, path: str | Path, settings: QueueSettings, *, reconnect_s: float = 1.0) -> None:
        """Bind it to the worker's socket; nothing is sent yet.

        ``reconnect_s`` is the longest wait between two tries to connect.
        """
        self._path = str(path)
        self._limit = int(settings.request_mb * MEGABYTE)
        self._deadline_s = settings.deadline_s
        self._reconnect_s = reconnect_s
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last = 0
        self._writer: asyncio.StreamWriter | None = None
        self._ponged = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._state: dict[str, Any] = {}

    @property
    def ready(self) -> bool:
        """Whether the worker is connected and has lately said that it takes requests."""
        fresh = time.monotonic() - self._ponged < STALE
        return self._writer is not None and fresh and self.state.get("ready") is True

    @property
    def state(self) -> Mapping[str, Any]:
        """The last answer to a ping: as in ``Guarding.state``, and what waits in the worker's queues."""
        return self._state

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stay_connected())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def guard(
        self, query: str, answer: str, *, threshold: float | None = None, rewrite: bool = True
    ) -> Guarded:
        """As ``Guarding.guard``."""
        started = time.monotonic()
        if threshold is not None:
            require_threshold("threshold", threshold)
        reply = await self._ask(
            {"op": "guard", "query": query, "answer": answer, "threshold": threshold, "rewrite": rewrite}
        )
        seconds = time.monotonic() - started
        if reply is None:
            return Guarded(Outcome.TOO_LONG, prompts.REFUSAL, None, seconds)
        return _guarded(reply, answer, threshold, seconds)

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's reply, ``None`` if the request is longer than it reads."""
        writer = self._writer
        if writer is None:
            raise GuardUnavailable("the guard is not connected")
        self._last += 1
        number = self._last
        content = {"id": number, **request, "within": self._deadline_s}
        line = json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        if len(line) > self._limit:
            return None
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            async with asyncio.timeout(self._deadline_s):
                writer.write(line)
                await writer.drain()
                reply = await future
        except TimeoutError:
            raise GuardUnavailable(f"the guard did not answer within {self._deadline_s:g} s") from None
        except OSError:
            raise GuardUnavailable("the connection to the guard was lost") from None
        finally:
            self._pending.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # seen, also where the write failed first
        if "error" in reply:
            raise _error(reply)
        return reply

    async def _stay_connected(self) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=self._limit + OVERHEAD)
            except OSError:
                await asyncio.sleep(wait)
                wait = min(2 * wait, self._reconnect_s)
                continue
            self._writer = writer
            pinging = asyncio.create_task(self._ping())
            try:
                while line := await reader.readline():
                    self._settle(line)
                    wait = FIRST_WAIT
            except Exception as error:
                log.error("the model worker's replies cannot be read (%s)", type(error).__name__)
            finally:
                pinging.cancel()
                self._lose()
                writer.close()
            log.warning("the connection to the model worker was lost")
            await asyncio.sleep(wait)

    def _settle(self, line: bytes) -> None:
        """Hand a reply to its request, which may have given up; ``ValueError`` if it is not one."""
        reply = json.loads(line)
        if not isinstance(reply, dict) or "id" not in reply:
            raise ValueError("not a reply")
        number = reply["id"]
        future = self._pending.get(number) if type(number) is int else None
        if future is not None and not future.done():
            future.set_result(reply)

    def _lose(self) -> None:
        self._writer = None
        self._ponged = -math.inf
        for future in self._pending.values():
            if not future.done():
                future.set_exception(GuardUnavailable("the connection to the guard was lost"))
        self._pending.clear()

    async def _ping(self) -> None:
        while True:
            try:
                reply = await self._ask({"op": "ping"})
            except GuardUnavailable:
                reply = None
            if reply is not None:
                self._state = {name: value for name, value in reply.items() if name != "id"}
                self._ponged = time.monotonic()
            await asyncio.sleep(PING_EVERY)


def _guarded(reply: dict[str, Any], answer: str, threshold: float | None, seconds: float) -> Guarded:
    """A reply that was checked: above all, only what was scored below the threshold is allowed."""
    text, score, used = reply.get("text"), reply.get("score"), reply.get("threshold")
    try:
        outcome = Outcome(str(reply.get("outcome")))
    except ValueError:
        raise GuardUnavailable(ODD) from None
    if not isinstance(text, str) or not _is_share(used) or (threshold is not None and used != threshold):
        raise GuardUnavailable(ODD)
    if outcome is Outcome.ALLOWED:
        sound = text == answer and _is_share(score) and score < used  # type: ignore[operator]
    else:
        replaced = text != answer or text == prompts.REFUSAL
        sound = replaced and bool(text.strip()) and (score is None or _is_share(score))
    if not sound:
        raise GuardUnavailable(ODD)
    return Guarded(outcome, text, None if score is None else float(score), seconds)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _error(reply: dict[str, Any]) -> GuardUnavailable:
    seconds = reply.get("retry_after")
    if reply["error"] == "overloaded" and isinstance(seconds, int | float) and 0 <= seconds < math.inf:
        return Overloaded("too many requests wait for the guard", float(seconds))
    return GuardUnavailable(f"the guard has no result ({reply['error']})")
