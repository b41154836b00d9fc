"""What goes to a client, as ASGI messages: one JSON body, or a stream of events."""

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Message, Receive, Send

from mllm_protector.serving.api_errors import ApiError, ClientGone
from mllm_protector.serving.sse import DONE, PING, frame

OUTCOME = "x-mllm-protector"
PENDING = "pending"
"""The outcome in the header of a stream that had to begin before there was a verdict."""

STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Sender:
    """The way to one client.

    Attributes:
        status: what was sent, or ``None`` while nothing was.
    """

    def __init__(self, send: Send, headers: Mapping[str, str] | None = None) -> None:
        """``headers`` are sent with every answer."""
        self._send = send
        self._headers = headers or {}
        self.status: int | None = None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers."""
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (name.lower().encode(), _latin(value))
                    for name, value in {**headers, **self._headers}.items()
                ],
            }
        )
        self.status = status

    async def whole(
        self, status: int, body: bytes, headers: Mapping[str, str], *, kind: str = "application/json"
    ) -> None:
        """Send a whole answer."""
        await self.start(status, {**headers, "content-type": kind, "content-length": str(len(body))})
        await self._body(body, more=False)

    async def json(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send JSON, all in ASCII."""
        await self.whole(status, json.dumps(content).encode(), headers or {})

    async def events(self, raw: bytes, headers: Mapping[str, str]) -> None:
        """Send events; before the first ones, the headers."""
        if self.status is None:
            await self.start(200, {**headers, **STREAM})
        await self._body(raw, more=True)

    async def ping(self, headers: Mapping[str, str]) -> None:
        """Send a comment, so that nobody takes the connection for dead."""
        await self.events(PING, {**headers, OUTCOME: PENDING})

    async def end(self) -> None:
        """End a stream."""
        await self._body(b"", more=False)

    async def error(self, error: ApiError) -> None:
        """Send an error: as the answer, or within a stream that has begun as its last frame but one."""
        if self.status is not None:
            await self._body(frame(json.dumps(error.content)) + frame(DONE), more=False)
        elif error.body is not None:
            kind = error.headers.get("content-type", "application/json")
            await self.whole(error.status, error.body, error.headers, kind=kind)
        else:
            await self.json(error.status, error.content, error.headers)

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def read_body(headers: Mapping[str, str], receive: Receive, *, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is longer than ``most`` bytes, compressed, or takes longer than ``seconds``.
        ClientGone: it does not come to an end.
    """
    too_long = ApiError(413, f"the body is longer than {most} bytes", code="body_too_long")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "compressed bodies are not read", code="unsupported_encoding")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {seconds:g} s", code="body_too_slow") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` as long as the client is there; it is cancelled when the client leaves.

    Raises:
        ClientGone: the client left first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


def _latin(value: str) -> bytes:
    return value.encode("latin-1", errors="replace").replace(b"\r", b" ").replace(b"\n", b" ")
