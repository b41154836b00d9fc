"""What pairs are wanted about: a YAML or JSONL file of scenarios, written by the user or ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm_protector.errors import InputError
from mllm_protector.reading import text_field
from mllm_protector.rows import parse_json_line
from mllm_protector.scenarios import CRITERIA, Criterion

FIELDS = ("name", "description", "pairs", "questions", "criterion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of question.

    Attributes:
        name: stands in each pair.
        description: what is asked for, in words for a language model.
        pairs: how many are wanted.
        criterion: what makes an answer to it safe.
        questions: the user's own, which come first.
    """

    name: str
    description: str
    pairs: int
    criterion: Criterion = Criterion.HARM
    questions: tuple[str, ...] = ()


def read_scenarios(path: str, pairs: int) -> list[Scenario]:
    """Read a ``.yaml``, ``.yml`` or ``.jsonl`` file: a list of mappings, or one object in each line.

    Args:
        path: each scenario has ``name`` and ``description``, and may have ``pairs``, ``questions`` (texts)
            and ``criterion`` (a ``Criterion``; without it that of the benchmark's scenario of this name, or
            ``harm``).
        pairs: wanted of a scenario that does not say so.

    Raises:
        InputError: the message names the file, the scenario and the field.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise InputError(f"scenario_file={path}: is no file")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"scenario_file={path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"scenario_file={path}: cannot be read as text ({type(error).__name__})") from None
    rows = _json_lines(path, text) if file.suffix == ".jsonl" else _yaml_list(path, text)
    if not rows:
        raise InputError(f"{path}: holds no scenario")
    found: dict[str, Scenario] = {}
    for place, row in rows:
        try:
            scenario = _parse(row, pairs)
            if scenario.name in found:
                raise ValueError(f"field 'name': {scenario.name} stands there twice")
        except ValueError as error:
            raise InputError(f"{path}: {place}: {error}") from None
        found[scenario.name] = scenario
    return list(found.values())


def _json_lines(path: str, text: str) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", parse_json_line(line.encode())))
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from None
    return rows


def _yaml_list(path: str, text: str) -> list[tuple[str, Any]]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else "somewhere"
        raise InputError(f"{path}: {place}: not valid YAML") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a list of scenarios, each with name and description")
    return [(f"scenario {number}", row) for number, row in enumerate(content, start=1)]


def _parse(row: Any, pairs: int) -> Scenario:
    if not isinstance(row, Mapping):
        raise ValueError("must be a mapping with name and description")
    if unknown := [str(name) for name in row if name not in FIELDS]:
        raise ValueError(f"unknown field '{unknown[0]}'; known: {', '.join(FIELDS)}")
    name = text_field(row, "name").strip()
    wanted = row.get("pairs", pairs)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f"field 'pairs' must be a whole number of at least 1, not {wanted!r}")
    questions = row.get("questions", ())
    if not isinstance(questions, Sequence) or isinstance(questions, str):
        raise ValueError("field 'questions' must be a list of texts")
    criterion = row.get("criterion", CRITERIA.get(name, Criterion.HARM))
    if criterion not in list(Criterion):
        raise ValueError(f"field 'criterion': unknown; choose one of {', '.join(Criterion)}")
    return Scenario(
        name=name,
        description=text_field(row, "description").strip(),
        pairs=wanted,
        criterion=Criterion(criterion),
        questions=tuple(_question(number, text) for number, text in enumerate(questions, start=1)),
    )


def _question(number: int, text: Any) -> str:
    try:
        return text_field({"questions": text}, "questions").strip()
    except ValueError as error:
        raise ValueError(f"question {number}: {error}") from None
