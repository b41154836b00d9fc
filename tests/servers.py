"""A scriptable server that speaks the OpenAI chat API on loopback, with every fault on demand.

with ScriptedServer(["first", too_many(retry_after=1), "third"]) as server: ...
with ScriptedServer(lambda request: failed(500) if request.attempt == 0 else request.text) as server: ...
"""

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes back. A script may also give a text, which stands for ``text(...)``.

    Attributes:
        seconds: before the first byte.
        pause: after each byte, headers included.
        endless: the body is repeated until the client leaves.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reset: bool = False
    pause: float | None = None
    endless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What came in.

    Attributes:
        body: the JSON.
        headers: with names in lower case.
        attempt: how many requests with the same body came before.
        index: how many requests came before.
        at: ``time.monotonic()`` of its arrival.
    """

    body: dict[str, Any]
    headers: dict[str, str]
    attempt: int
    index: int
    at: float

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parts of the last turn."""
        content = self.body["messages"][-1]["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The words of the last turn."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures of the last turn; whatever is no data URI raises."""
        found = []
        for part in self.parts:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(";base64,")
                assert kind.startswith("data:image/"), "a picture is not sent as a data URI"
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


Script = Callable[[Request], Reply | str] | Sequence[Reply | str]


def text(words: str | None, *, finish: str = "stop", refusal: str | None = None, seconds: float = 0) -> Reply:
    message = {"role": "assistant", "content": words, "refusal": refusal}
    return completion([{"index": 0, "finish_reason": finish, "message": message}], seconds=seconds)


def completion(choices: Any, *, seconds: float = 0) -> Reply:
    content = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
    return Reply(body=json.dumps(content).encode(), seconds=seconds)


def failed(status: int, *, code: str | None = None, **headers: str) -> Reply:
    """An error status; header names are written with underscores."""
    error = {"message": "a scripted error", "type": "error", "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, body=json.dumps({"error": error}).encode(), headers=named)


def too_many(*, retry_after: float | None = None) -> Reply:
    return failed(429) if retry_after is None else failed(429, retry_after=str(retry_after))


def slow(seconds: float, words: str = "late") -> Reply:
    return text(words, seconds=seconds)


def trickle(pause: float) -> Reply:
    """A byte at a time, for a thousand bytes."""
    return Reply(pause=pause)


def endless() -> Reply:
    return Reply(body=1_000_000 * b" ", endless=True)


def silent() -> Reply:
    """The connection is accepted, and nothing ever comes."""
    return Reply(seconds=3600)


def reset() -> Reply:
    """The connection is torn down without an answer."""
    return Reply(reset=True)


def cut_json() -> Reply:
    whole = text("a reply that is cut").body
    return Reply(body=whole[: len(whole) // 2])


def empty_body() -> Reply:
    return Reply()


def no_choices() -> Reply:
    return completion([])


def no_content() -> Reply:
    return text(None)


def refusal() -> Reply:
    return text(None, refusal="I will not do that.")


def content_filter() -> Reply:
    return text("", finish="content_filter")


def wrong_language() -> Reply:
    return text("Ich kann diese Frage leider nur auf Deutsch beantworten. 我不能回答。")


class ScriptedServer:
    """Answers by a script until it is closed.

    Attributes:
        requests: in the order of their arrival.
        busiest: the highest number of requests that were under way at once.
    """

    def __init__(self, script: Script) -> None:
        """Start to listen.

        Args:
            script: a function of the request, called by several threads at once; or replies in the order of
                arrival, of which the last one is repeated.
        """
        self.requests: list[Request] = []
        self.busiest = 0
        self._script = script
        self._busy = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        return len(self.requests)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop to listen; slow replies end at once."""
        if not self._closing.is_set():
            self._closing.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def wait(self, seconds: float) -> bool:
        """Whether the server is closed meanwhile."""
        return self._closing.wait(seconds)

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            attempt = sum(earlier.body == body for earlier in self.requests)
            request = Request(
                body=body, headers=headers, attempt=attempt, index=self.count, at=time.monotonic()
            )
            self.requests.append(request)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            if callable(self._script):
                reply = self._script(request)
            else:
                reply = self._script[min(request.index, len(self._script) - 1)]
            reply = text(reply) if isinstance(reply, str) else reply
            self.wait(reply.seconds)
            return reply
        finally:
            with self._lock:
                self._busy -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a connection that a script tore down, is no news."""


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path not in ("/v1/chat/completions", "/v1/moderations"):
                self._send(failed(404))
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = server.answer(json.loads(content), headers)
            if reply.reset:
                at_once = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                socket.close(self.connection.detach())
                self.close_connection = True
            else:
                self._send(reply)

        def _send(self, reply: Reply) -> None:
            if reply.pause is not None:
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + 1000 * b" ":
                    self.connection.send(bytes([byte]))
                    if server.wait(reply.pause):
                        return
            if reply.endless:
                self.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while not server.wait(0):
                    self.connection.sendall(reply.body)
            self.send_response(reply.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))}
            for name, value in (headers | dict(reply.headers)).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
            pass

    return Handler
