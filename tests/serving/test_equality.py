"""The command in front of a real server gives what the guard within Python gives on the same model."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from mllm_protector.guard.mllm import ProtectedMLLM
from mllm_protector.guard.protector import Protector
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.mllm import load_mllm
from mllm_protector.records import Outcome
from tests.models.builders import save_tiny_llava_for_tests
from tests.models.fixtures import LORA
from tests.real_server import real_server
from tests.serving.stubs import PATIENCE

REPOSITORY = Path(__file__).parents[2]
TOKENS = 8


@contextmanager
def command(log: Path, *arguments: str) -> Iterator[str]:
    """``python scripts/serve.py``; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'scripts'}"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "scripts" / "serve.py"), f"port={port}", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | path,
            cwd=log.parent,
        )
    try:
        end = time.monotonic() + PATIENCE
        while not ready(f"http://127.0.0.1:{port}/ready"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def ready(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def picture(index: int) -> Image.Image:
    """Each of another size and other colours."""
    image = Image.radial_gradient("L").resize((40 + 7 * index, 30 + index))
    return Image.merge("RGB", [image, image.rotate(90 * index), image.transpose(Image.Transpose.ROTATE_180)])


def asked(text: str, image: Image.Image | None) -> list[dict[str, Any]]:
    """The messages of a question."""
    if image is None:
        return [{"role": "user", "content": text}]
    file = io.BytesIO()
    image.save(file, "png")
    address = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    parts = [{"type": "image_url", "image_url": address}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_guarded_answers_are_those_of_a_protected_mllm(
    make_detector: Callable[..., HarmDetector], make_detoxifier: Callable[..., Detoxifier], tmp_path: Path
) -> None:
    make_detector(tuning=LORA).save(tmp_path / "detector")
    make_detoxifier(tuning=LORA).save(tmp_path / "detoxifier")
    llava = save_tiny_llava_for_tests(tmp_path / "llava")
    questions = [(f"What is number {index}?", picture(index) if index % 2 else None) for index in range(8)]
    parts = Protector.from_pretrained(tmp_path / "detector", tmp_path / "detoxifier", device="cpu")
    mllm = load_mllm(name=str(llava), batch_size=1, max_new_tokens=TOKENS, device="cpu")
    raw = mllm.generate(questions)
    scores = sorted(parts.detector.score(queries=[text for text, _ in questions], answers=raw))
    threshold = (scores[3] + scores[4]) / 2  # half of the answers are flagged
    protector = Protector(parts.detector, parts.corrector, threshold)
    expected = ProtectedMLLM(mllm, protector).generate(questions)
    replies = protector.guard(queries=[text for text, _ in questions], answers=raw)
    outcomes = [reply.outcome for reply in replies]
    assert {*outcomes} > {Outcome.ALLOWED}

    with (
        real_server(tmp_path / "server.log") as server,
        command(
            tmp_path / "serve.log",
            f"url={server.base_url}",
            f"guard.detector={tmp_path / 'detector'}",
            f"guard.detoxifier={tmp_path / 'detoxifier'}",
            "guard.device=cpu",
            f"policy.threshold={threshold!r}",
        ) as url,
    ):
        for (text, image), answer, reply in zip(questions, expected, replies, strict=True):
            body = {"model": str(llava), "messages": asked(text, image), "max_tokens": TOKENS}
            said = httpx.post(
                f"{url}/chat/completions",
                json=body | {"temperature": 0},
                headers={"x-mllm-protector-details": "1"},
                trust_env=False,
                timeout=60,
            )
            assert said.headers["x-mllm-protector"] == reply.outcome, said.text
            assert said.json()["choices"][0]["message"]["content"] == answer
            [details] = said.json()["mllm_protector"]["choices"]
            assert details["score"] == pytest.approx(reply.harm, abs=1e-4)
