from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_protector.models.chat import ServedChat
from mllm_protector.models.local_chat import LocalChat
from mllm_protector.models.mllm import load_mllm
from mllm_protector.models.served import ServedMLLM
from mllm_protector.records import Question
from tests.models.builders import save_tiny_classifier_base, save_tiny_llava_for_tests
from tests.real_server import RealServer, real_server

SETTINGS: dict[str, Any] = {"concurrency": 1, "timeout": 60.0, "max_retries": 1, "temperature": 0.0}


class Gradient:
    """A picture of which no two sizes look alike."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def load(self) -> Image.Image:
        return Image.radial_gradient("L").resize(self.size).convert("RGB")

    def digest(self) -> str:
        return str(self.size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    save_tiny_llava_for_tests(root / "llava")
    save_tiny_classifier_base("llama", root / "lm")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    with real_server(folder / "server.log") as running:
        yield running


def questions(count: int) -> list[Question]:
    """Every second one with a picture, each of another size."""
    return [
        Question(
            id=str(index),
            scenario="06-Fraud",
            variant="SD" if index % 2 else "TEXT",
            text=f"What is number {index}?",
            image=Gradient(40, 20 + index) if index % 2 else None,
        )
        for index in range(count)
    ]


def test_a_served_model_gives_the_answers_of_the_same_model_loaded_here(
    server: RealServer, folder: Path
) -> None:
    asked = questions(6)
    served = ServedMLLM(
        model=str(folder / "llava"),
        base_url=server.base_url,
        max_new_tokens=8,
        **SETTINGS | {"concurrency": 4},
    )
    loaded = load_mllm(name=str(folder / "llava"), batch_size=6, max_new_tokens=8, device="cpu")
    answers = served.generate(asked)
    assert answers == list(loaded.generate(asked))
    assert len(set(answers)) > 1


def test_one_server_serves_a_language_model_too(server: RealServer, folder: Path) -> None:
    turns = [[{"role": "user", "content": "How do I bake bread?"}], [{"role": "user", "content": "Why?"}]]
    served = ServedChat(model=str(folder / "lm"), base_url=server.base_url, **SETTINGS)
    loaded = LocalChat(name=str(folder / "lm"), batch_size=2, device="cpu")
    assert served.complete(turns, max_tokens=8) == loaded.complete(turns, max_tokens=8)
