"""Both ends of plain HTTP, cheap enough that a load test measures what lies between them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next head, in small letters, and body of a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, found, rest = head.partition(b"content-length:")
    return head, await reader.readexactly(int(rest.partition(b"\r\n")[0]) if found else 0)


class Peer:
    """One client with one connection."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def ask(self, text: str) -> dict[str, Any]:
        """The answer to a question, or the error in its place."""
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
        self._writer.write(POST % (len(body), body))
        _, answer = await read_message(self._reader)
        content: dict[str, Any] = json.loads(answer)
        return content


@asynccontextmanager
async def echoing(seconds: float) -> AsyncIterator[int]:
    """An upstream that says each question again after some seconds; gives its port."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                _, body = await read_message(reader)
                if seconds:
                    await asyncio.sleep(seconds)
                answer = json.dumps(_completion(json.loads(body)["messages"][-1]["content"])).encode()
                writer.write(OK % (len(answer), answer))
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    top = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m"}
    return {**top, "choices": choices, "usage": usage}
