"""What the README shows is what the project does."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.records import Question
from mllm_protector.rendering import RenderedText
from tests.models.builders import save_tiny_llava_for_tests

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def snippet(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"no snippet {name}"
    return found.group(1)


def code_lines(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if line.strip() and not line.startswith(("#", "from ", "import "))
    ]


@pytest.fixture
def trained(
    make_detector: Callable[..., HarmDetector],
    make_detoxifier: Callable[..., Detoxifier],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    make_detector().save(tmp_path / "outputs" / "detector")
    make_detoxifier().save(tmp_path / "outputs" / "detoxifier")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plain_texts_are_guarded_in_two_lines(trained: Path) -> None:
    code = snippet("guard-texts")
    assert len(code_lines(code)) == 2
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    [reply] = names["replies"]
    assert reply.raw == "Sure, ..."
    assert reply.outcome in {"allowed", "rewritten", "refused"}


def test_any_model_is_wrapped_and_asked_in_four_lines(trained: Path) -> None:
    code = snippet("guard-mllm")
    assert len(code_lines(code)) == 4
    RenderedText("a photo").load().save(trained / "photo.jpg")
    mllm = save_tiny_llava_for_tests(trained / "mllm")
    names: dict[str, Any] = {}
    exec(code.replace("llava-hf/llava-1.5-7b-hf", str(mllm)).replace("=512", "=4"), names)  # noqa: S102
    questions = [
        Question(id="1", scenario="any", variant="TEXT", text="What is this?"),
        Question(id="2", scenario="any", variant="TYPO", text="What is this?", image=RenderedText("words")),
    ]
    answers = names["guarded"].generate(questions)
    assert [type(text) for text in (names["answer"], *names["answers"], *answers)] == [str] * 5


def test_the_file_tree_names_every_file() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    tree = README.split("## Files")[1]
    for path in map(Path, tracked):
        if path.parts[0] in ("mllm_protector", "scripts") and path.name not in ("__init__.py", "py.typed"):
            assert re.search(rf"\b{re.escape(path.name)}\b", tree), f"{path} is not in the README's tree"


def test_every_option_of_the_table_exists() -> None:
    table = README.split("| key | options |")[1].split("\n\n")[0]
    for group, options in re.findall(r"\| `(\w+)=` \| (.*) \|", table):
        for option in re.findall(r"`([\w.]+)`", options):
            assert list(REPOSITORY.glob(f"configs/**/{group}/{option}.yaml")), f"no {group}={option}"
