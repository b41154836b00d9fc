"""The README and the pages of docs/ show what the project does."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mllm_protector.calls import check_call
from mllm_protector.command_line import quoted
from mllm_protector.commands import COMMANDS
from mllm_protector.errors import InputError
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.records import Answer, LabelledAnswer, Question, Status
from mllm_protector.rendering import RenderedText
from tests.models.builders import save_tiny_llava_for_tests
from tests.test_config import FUNCTIONS, composed, filled_in

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RECIPES = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
EXTEND = (REPOSITORY / "docs" / "extend.md").read_text(encoding="utf-8")


def snippet(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    assert found, f"no snippet {name}"
    return found.group(1)


def executed(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)  # noqa: S102 - our own words
    return names


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


def test_plain_texts_are_guarded_as_the_readme_says(trained: Path) -> None:
    [reply] = executed(snippet(README, "guard-texts"))["replies"]
    assert reply.raw == "Sure, ..."
    assert reply.outcome in {"allowed", "rewritten", "refused"}


def test_any_model_is_wrapped_and_asked_as_the_recipes_say(trained: Path) -> None:
    code = snippet(RECIPES, "guard-mllm")
    RenderedText("a photo").load().save(trained / "photo.jpg")
    mllm = save_tiny_llava_for_tests(trained / "mllm")
    names = executed(code.replace("llava-hf/llava-1.5-7b-hf", str(mllm)).replace("=512", "=4"))
    questions = [
        Question(id="1", scenario="any", variant="TEXT", text="What is this?"),
        Question(id="2", scenario="any", variant="TYPO", text="What is this?", image=RenderedText("words")),
    ]
    answers = names["guarded"].generate(questions)
    assert [type(text) for text in (names["answer"], *names["answers"], *answers)] == [str] * 5


def test_a_judge_and_a_data_source_are_added_in_few_lines(tmp_path: Path) -> None:
    judge, source = (snippet(EXTEND, f"example: {name}") for name in ("judges/length.py", "data/chats.py"))
    assert max(len(code.splitlines()) for code in (judge, source)) < 60
    question = Question(id="1", scenario="any", variant="TEXT", text="What is this?")
    [verdict] = executed(judge)["LengthJudge"](words=2).judge([question], [Answer(id="1", text="a b c")])
    assert verdict.status == Status.HARMFUL
    path = tmp_path / "chats.jsonl"
    rows = (f'{{"user": "question {row}", "bot": "answer", "flagged": false}}\n' for row in range(20))
    path.write_text("".join(rows))
    options = {"validation_fraction": 0.1, "seed": 0, "limit": None, "duplicates": "keep", "quarantine": None}
    splits = executed(source)["Chats"](path=str(path), **options).load()
    assert len(splits.train) + len(splits.validation) == 20
    assert splits.train[0] == LabelledAnswer(query=splits.train[0].query, answer="answer", harmful=False)


def test_the_readme_is_short_and_its_links_and_options_exist() -> None:
    assert len(README.splitlines()) <= 150
    for folder, page in ((REPOSITORY, README), (REPOSITORY / "docs", RECIPES + ARCHITECTURE + EXTEND)):
        for link in re.findall(r"\]\(([^)#:]+)[)#]", page):
            assert (folder / link).exists(), link
    for group, options in re.findall(r"\| `(\w+)=` \| (.*) \|", RECIPES):
        for option in re.findall(r"`([\w.]+)`", options):
            assert list(REPOSITORY.glob(f"configs/**/{group}/{option}.yaml")), f"no {group}={option}"
    for path in re.findall(r"`([a-z]+/\w+\.py)`", ARCHITECTURE):
        assert any((folder / path).exists() for folder in (REPOSITORY, REPOSITORY / "mllm_protector")), path


def test_every_command_of_the_docs_is_accepted_by_its_script() -> None:
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = 0
    for page in pages:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
        text = "".join(blocks).replace("\\\n", " ")
        typed = re.findall(r"scripts/(\w+)\.py([^\n`#|]*)", text)
        commands = re.findall(r"mllm[-_]protector ([a-z][\w-]*)(?![\w=-])([^\n`#|]*)", text)
        for name, arguments in [*typed, *((COMMANDS[name].config, rest) for name, rest in commands)]:
            overrides = [
                each
                for each in shlex.split(arguments)
                if "=" in each and "..." not in each and each[0] != "-"
            ]
            if name not in FUNCTIONS or not overrides or "my_set" in arguments or "local=mine" in arguments:
                continue  # my_set and local=mine are options that the reader writes
            found += 1
            try:
                content = OmegaConf.to_container(filled_in(composed(name, *quoted(overrides))), resolve=True)
                check_call("", FUNCTIONS[name], content)  # type: ignore[arg-type]
            except (HydraException, OmegaConfBaseException, InputError, KeyError) as error:
                raise AssertionError(f"{page.name}: {name}.py{arguments}: {error}") from error
    assert found > 30
