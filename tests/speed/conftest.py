"""A small bench on toy texts; the models of its arms share their frozen weights."""

import pytest

from mllm_protector.data.sources import Toy
from speed.arms import Bench, Settings
from speed.shape import Shape
from speed.workload import Texts, read_texts

SETTINGS = Settings(max_length=256, micro_batch_tokens=300, slots=4, new_tokens=8, learning_rate=1e-3, seed=0)


@pytest.fixture(scope="session")
def shape() -> Shape:
    return Shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=600, dtype="float32")


@pytest.fixture(scope="session")
def texts(shape: Shape) -> Texts:
    return read_texts(Toy(), shape, pairs=4, rewrites=8, max_length=256, seed=0)


@pytest.fixture
def bench(shape: Shape, texts: Texts) -> Bench:
    return Bench(shape, texts, SETTINGS)
