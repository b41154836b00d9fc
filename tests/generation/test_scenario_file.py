from pathlib import Path

import pytest

from mllm_protector.config import CONFIGS
from mllm_protector.errors import InputError
from mllm_protector.generation.scenario_file import Scenario, read_scenarios
from mllm_protector.scenarios import CRITERIA, SCENARIOS, Criterion


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_our_own_file_has_the_scenarios_of_the_benchmark() -> None:
    found = read_scenarios(str(CONFIGS / "scenarios" / "mm_safety_bench.yaml"), pairs=7)
    assert tuple(scenario.name for scenario in found) == SCENARIOS
    assert all(scenario.criterion == CRITERIA[scenario.name] and scenario.pairs == 7 for scenario in found)
    assert len({scenario.description for scenario in found}) == len(SCENARIOS)


def test_a_users_file_says_what_is_wanted(tmp_path: Path) -> None:
    expected = Scenario(name="a", description="b", pairs=3, criterion=Criterion.LEGAL, questions=("c", "d"))
    for name, text in (
        ("a.yaml", "- {name: a, description: b, pairs: 3, questions: [ 'c ', d], criterion: legal}\n"),
        (
            "a.jsonl",
            '{"name": "a", "description": "b", "pairs": 3, "questions": ["c", "d"],'
            ' "criterion": "legal"}\n\n',
        ),
    ):
        assert read_scenarios(written(tmp_path, text, name), pairs=1) == [expected], name


MISTAKES = {
    "": "must be a list of scenarios",
    "[]": "holds no scenario",
    "a: b": "must be a list of scenarios",
    "- a\n- [": "line 2: not valid YAML",
    "- !!python/object/apply:os.getcwd []": "line 1: not valid YAML",
    "- a": "scenario 1: must be a mapping",
    "- {name: a}": "scenario 1: field 'description': Field required",
    "- {name: a, description: b}\n- {name: a, description: c}": "the name a is used 2 times",
    "- {name: a, description: b, count: 3}": "scenario 1: field 'count': Unexpected keyword",
    "- {name: a, description: b, pairs: 0}": "scenario 1: field 'pairs': must be greater than or equal to 1",
    "- {name: a, description: b, pairs: yes}": "scenario 1: field 'pairs': must be a valid integer",
    "- {name: a, description: b, questions: c}": "scenario 1: field 'questions': must be a valid tuple",
    "- {name: a, description: b, questions: [c, 3]}": "scenario 1: field 'questions.1': must be a valid str",
    "- {name: a, description: b, criterion: c}": "scenario 1: field 'criterion': must be 'harm', 'lobbying'",
    "- {name: 3, description: b}": "scenario 1: field 'name': must be a valid string",
    '- {name: "a\\0", description: b}': "scenario 1: field 'name': String should match pattern",
}


def test_a_mistake_is_one_line_with_file_and_place(tmp_path: Path) -> None:
    for text, problem in MISTAKES.items():
        path = written(tmp_path, text)
        try:
            read_scenarios(path, pairs=1)
            said = "nothing"
        except InputError as error:
            said = str(error)
        assert said.startswith(f"{path}: {problem}"), text
        assert "\n" not in said, text


def test_a_mistake_in_jsonl_is_named_by_its_line(tmp_path: Path) -> None:
    for second, problem in (
        ("{", "not valid JSON"),
        ('{"name": "c"}', "field 'description': Field required"),
    ):
        path = written(tmp_path, '{"name": "a", "description": "b"}\n' + second, "mine.jsonl")
        with pytest.raises(InputError, match=rf"mine.jsonl:2: {problem}"):
            read_scenarios(path, pairs=1)
