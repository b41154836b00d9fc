"""Connections to a server that may be slow, endless or silent: bounded in time and size, and left at will.

The HTTP library's own time limits are for each read and each connection, so a server that sends a byte a
second keeps a request alive for ever.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal
from openai import DefaultAsyncHttpxClient, OpenAIError

T = TypeVar("T")

MAX_REPLY_MB = 16
"""Megabytes of a reply, unpacked; no answer of a language model comes near."""


class TooLarge(OpenAIError):
    """A reply of more than ``MAX_REPLY_MB``; the official client hands this on and does not ask again."""


class BoundedClient(DefaultAsyncHttpxClient):
    """The official client's connections, with an end to each request."""

    def __init__(self, seconds: float) -> None:
        """Allow a request so many seconds, from connecting to the last byte of its reply."""
        super().__init__()
        self._seconds = seconds

    async def send(self, request: Any, **settings: Any) -> Any:
        """One request with its whole reply, as in httpx.

        Raises:
            ReadTimeout: of the client's HTTP library (httpx, or httpx2 as of openai 3).
            TooLarge: the reply is longer than ``MAX_REPLY_MB``.
        """
        try:
            async with asyncio.timeout(self._seconds):
                return await self._whole(request, settings | {"stream": True})
        except TimeoutError:
            library = sys.modules[type(request).__module__.partition(".")[0]]
            raise library.ReadTimeout("the whole request took too long", request=request) from None

    async def _whole(self, request: Any, settings: dict[str, Any]) -> Any:
        response = await super().send(request, **settings)
        body = bytearray()
        try:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_REPLY_MB * 1_000_000:
                    raise TooLarge
        finally:
            await response.aclose()
        headers = [pair for pair in response.headers.multi_items() if pair[0] not in _TRANSPORT]
        return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)


_TRANSPORT = ("content-encoding", "content-length", "transfer-encoding")
"""What is true of the bytes on the wire only."""


def run_in_background(work: Callable[[], Awaitable[T]]) -> T:
    """The outcome of asynchronous work, which an exception in this thread, such as Ctrl-C, cancels at once.

    It has a thread and an event loop of its own, so that it also runs within another loop, as in a notebook.
    """
    with start_blocking_portal() as portal:
        return portal.call(work)
