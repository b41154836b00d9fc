"""What vLLM does with a model of ours, as docs/serving.md says, over the model itself; and its faults."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from mllm_protector.models.detector import HarmDetector, score_logits
from mllm_protector.models.detoxifier import Detoxifier

Values = Callable[[list[float]], list[Any]]
Answer = dict[str, Any] | int
"""JSON, or an error status."""


class FakeServer:
    """A server on a port of its own, which can be stopped and started again at the same address.

    Attributes:
        asked: the bodies of all requests.
        keys: their ``Authorization`` headers.
        seconds: before each answer.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seconds = 0.0
        self._alone = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        raise NotImplementedError

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.asked.append(body)
                fake.keys.append(self.headers["authorization"])
                time.sleep(fake.seconds)
                with fake._alone:
                    said = fake.answer(self.path, body)
                self.send_response(said if isinstance(said, int) else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"error": "no"} if isinstance(said, int) else said).encode())

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True

            def handle_error(self, *args: Any) -> None:
                """Clients of slow answers leave."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class FakeVllm(FakeServer):
    """``/classify``.

    Attributes:
        values: makes of logits what a faulty server sends.
        extra: tokens that it adds.
        refused: the error status of each row of ids that it does not take.
    """

    def __init__(self, detector: HarmDetector, values: Values | None = None, *, extra: int = 0) -> None:
        self.detector = detector
        self.values: Values = values or (lambda logits: logits)
        self.extra = extra
        self.refused: dict[tuple[int, ...], int] = {}
        super().__init__()

    @property
    def rows(self) -> int:
        """How many rows it was sent."""
        return sum(len(body["input"]) for body in self.asked)

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path != "/classify":
            return 404
        rows = body["input"]
        for row in rows:
            if tuple(row) in self.refused:
                return self.refused[tuple(row)]
        logits = score_logits(self.detector.model, self.detector.encoder, rows, limit=self.detector.limit)
        if body.get("use_activation", True):
            logits = [1 / (1 + math.exp(-logit)) for logit in logits]
        probs = [value if isinstance(value, list) else [value] for value in self.values(logits)]
        data = [
            {"index": index, "label": "HARMFUL", "probs": each, "num_classes": len(each)}
            for index, each in enumerate(probs)
        ]
        count = sum(map(len, rows)) + self.extra
        return {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": count}}


class FakeCompletions(FakeServer):
    """``/v1/completions`` and ``/v1/chat/completions`` of a detoxifier under the name ``mine``."""

    def __init__(self, detoxifier: Detoxifier) -> None:
        self.detoxifier = detoxifier
        super().__init__()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if body["model"] != "mine":
            return 404
        if path == "/v1/chat/completions":
            message = {"role": "assistant", "content": f"Better: {body['messages'][-1]['content'][:9]}"}
            return {"id": "x", "object": "chat.completion", "created": 0, "model": "mine"} | {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]
            }
        made = self.detoxifier
        batch = made.encoder.pad_prompts([body["prompt"]])
        new = made.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            pad_token_id=made.encoder.pad_id,
            eos_token_id=made.encoder.end_id,
        )[0, len(body["prompt"]) :]
        text = made.encoder.tokenizer.decode(new, skip_special_tokens=True)
        return {"choices": [{"index": 0, "text": text}], "usage": {"prompt_tokens": len(body["prompt"])}}
