"""A model of ours behind an OpenAI-compatible address, one answer at a time: for demonstrations."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mllm_protector.errors import RunError
from mllm_protector.images import LoadedImage
from mllm_protector.protocols import MLLM
from mllm_protector.records import Question
from mllm_protector.serving.api_errors import ApiError, bad_request
from mllm_protector.serving.assembly import chunks
from mllm_protector.serving.sse import DONE, frame

NAME = "demo"
STARTED_S = 30.0
"""The longest that opening the port may take."""


def demo_app(mllm: MLLM) -> Starlette:
    """An ASGI application that answers the last turn of a chat, with its image if it has one."""
    alone = threading.Lock()

    def answer(question: Question) -> str:
        with alone:
            [text] = mllm.generate([question])
        if not isinstance(text, str):
            raise ApiError(500, text.reason, code="no_answer")
        return text

    async def chat(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
            question = _question(body)
            text = await asyncio.to_thread(answer, question)
        except ApiError as error:
            return JSONResponse(error.content, error.status)
        except (ValueError, TypeError, KeyError, IndexError, OSError):
            return JSONResponse(bad_request("the demo cannot read this").content, 400)
        count = len(text.split())
        asked = len(question.text.split())
        usage = {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        top = {"id": f"demo-{time.time_ns()}", "object": "chat.completion", "created": int(time.time())}
        whole = {**top, "model": NAME, "choices": [choice], "usage": usage}
        if not body.get("stream"):
            return JSONResponse(whole)
        if not (body.get("stream_options") or {}).get("include_usage"):
            del whole["usage"]
        return StreamingResponse(_events(whole), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model", "owned_by": "demo"}]})

    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    )


@contextmanager
def demo_server(mllm: MLLM) -> Iterator[str]:
    """Serve a model on a free port of this machine's loopback; gives the address.

    Raises:
        RunError: the port did not open.
    """
    config = uvicorn.Config(demo_app(mllm), host="127.0.0.1", port=0, log_config=None, access_log=False)
    config.timeout_graceful_shutdown = 1
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + STARTED_S
    while not server.started:
        if time.monotonic() > end or not thread.is_alive():
            raise RunError("the demo's model did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(5)


async def _events(whole: dict[str, Any]) -> AsyncIterator[bytes]:
    for chunk in chunks(whole, alone=True, null="usage" in whole):
        yield frame(json.dumps(chunk))
    yield frame(DONE)


def _question(body: dict[str, Any]) -> Question:
    content = [turn for turn in body["messages"] if turn.get("role") == "user"][-1]["content"]
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
    image = None
    for part in parts:
        if part.get("type") == "image_url":
            kind, _, data = part["image_url"]["url"].partition(";base64,")
            if not kind.startswith("data:image/"):
                raise bad_request("the demo takes images as data URIs only; nothing is fetched")
            image = LoadedImage(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB"))
    return Question(id="0", scenario="", variant="TEXT" if image is None else "SD", text=text, image=image)
