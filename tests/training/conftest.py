from pathlib import Path

import pytest

from tests.training.parts import save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose tokenizer knows the made-up pairs; not to be changed."""
    return save_base(tmp_path_factory.mktemp("base") / "llama")
