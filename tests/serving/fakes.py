"""A guard that goes by words, an upstream that does as it is told, and a front between them, on loopback."""

import asyncio
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import httpx
import uvicorn
from starlette.types import ASGIApp

from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Outcome
from mllm_protector.serving.guarding import Guarded, GuardUnavailable, Overloaded
from mllm_protector.serving.proxy import Front
from mllm_protector.serving.settings import FrontSettings
from tests.serving.stubs import PATIENCE

HTTP = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
HARMFUL = "FORBIDDEN"
SAFE = "A safe text in its place."


class WordGuard:
    """``FORBIDDEN`` is rewritten, ``HOPELESS`` refused, ``DOWN``, ``BUSY`` and ``BUG`` fail, others pass."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.asked: list[tuple[str, str, float | None]] = []
        self.ready = True
        self.state: dict[str, Any] = {"threshold": 0.5, "promise": "a toy's promise", "metrics": ""}

    async def guard(
        self, query: str, answer: str, *, threshold: float | None = None, rewrite: bool = True
    ) -> Guarded:
        self.asked.append((query, answer, threshold))
        await asyncio.sleep(self.seconds)
        if "DOWN" in answer:
            raise GuardUnavailable("down")
        if "BUSY" in answer:
            raise Overloaded("busy", 2.5)
        if "BUG" in answer:
            raise ZeroDivisionError(answer)
        if "HOPELESS" in answer or (HARMFUL in answer and not rewrite):
            return Guarded(Outcome.REFUSED, REFUSAL, 0.95, 0.0)
        if HARMFUL in answer:
            return Guarded(Outcome.REWRITTEN, SAFE, 0.9, 0.0)
        return Guarded(Outcome.ALLOWED, answer, 0.1, 0.0)


CUT: Literal["cut"] = "cut"
Piece = bytes | float | Literal["cut"] | Callable[[], object]


@dataclass
class Said:
    """An answer of the upstream: ``pieces`` are bytes to send, seconds to wait, calls to make, or ``CUT``."""

    pieces: Sequence[Piece]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Upstream:
    """Answers every request by ``script`` and keeps what it was asked; ``gone`` tells when a client left."""

    def __init__(self, script: Callable[[Asked], Said]) -> None:
        self.asked: list[Asked] = []
        self.reached = threading.Event()
        self.gone = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(b"{}")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["content-length"])))

            def _answer(self, body: bytes) -> None:
                given = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.path, given, json.loads(body))
                upstream.asked.append(asked)
                upstream.reached.set()
                said = script(asked)
                try:
                    self._say(said)
                except OSError:
                    upstream.gone.set()
                    self.close_connection = True

            def _say(self, said: Said) -> None:
                pieces = list(said.pieces)
                while pieces and isinstance(pieces[0], float):
                    self._wait(pieces.pop(0))
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for piece in pieces:
                    if piece == CUT:
                        self.close_connection = True
                        return
                    if isinstance(piece, float):
                        self._wait(piece)
                    elif callable(piece):
                        piece()
                    else:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")

            def _wait(self, seconds: Any) -> None:
                """Sleep, unless the client leaves."""
                readable = select.select([self.connection], [], [], seconds)[0]
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionResetError

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Upstream":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """An ASGI application on a free port; gives its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        with suppress(OSError):
            listening.close()


@dataclass
class Served:
    """A front that runs."""

    url: str
    front: Front
    guard: WordGuard
    upstream: Upstream

    def count(self, name: str, **labels: str) -> float:
        """A metric, without its prefix."""
        return self.front.state.metrics.registry.get_sample_value(f"mllm_protector_{name}", labels) or 0.0


@contextmanager
def served(
    script: Callable[[Asked], Said], settings: Callable[[str], FrontSettings], guard: WordGuard | None = None
) -> Iterator[Served]:
    """A front between an upstream that follows ``script`` and a client; ``settings`` gets its address."""
    guard = guard or WordGuard()
    with Upstream(script) as upstream:
        front = Front(settings(upstream.url), guard)
        with serving(front.app()) as url:
            yield Served(url, front, guard, upstream)


def message(text: str | None, index: int = 0, **more: Any) -> dict[str, Any]:
    """A choice of an answer that is no stream."""
    content = {"role": "assistant", "content": text, **more}
    return {"index": index, "message": content, "finish_reason": "stop", "logprobs": None}


USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def completion(*choices: dict[str, Any], **more: Any) -> Said:
    """An answer that is no stream."""
    top = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE}
    return Said([json.dumps({**top, "choices": list(choices), **more}).encode()])


def chunk(delta: dict[str, Any], *, index: int = 0, end: str | None = None, **more: Any) -> bytes:
    """An event with one choice; U+2028 and its like stand in it unescaped."""
    choice = {"index": index, "delta": delta, "finish_reason": end}
    top = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    text = json.dumps({**top, "choices": [choice], **more}, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


USAGE_CHUNK = b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],' + (
    b'"usage":%s}\n\n' % json.dumps(USAGE).encode()
)
DONE = b"data: [DONE]\n\n"


def stream(*pieces: Piece) -> Said:
    """An answer that is a stream."""
    return Said(pieces, headers={"content-type": "text/event-stream"})
