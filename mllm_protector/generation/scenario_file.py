"""What pairs are wanted about: a YAML or JSONL file of scenarios, the user's own or ours."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllm_protector.errors import InputError
from mllm_protector.reading import read_records
from mllm_protector.scenarios import CRITERIA, Criterion

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\x00]*$")]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Scenario:
    """One kind of question.

    Attributes:
        name: written into each pair.
        description: what to ask for, in words for a language model.
        pairs: how many are wanted.
        criterion: what makes an answer safe.
        questions: the user's own, which come first.
    """

    name: Text
    description: Text
    pairs: Annotated[int, Field(strict=True, ge=1)]
    criterion: Criterion = Criterion.HARM
    questions: tuple[Text, ...] = ()


def read_scenarios(path: str, pairs: int) -> list[Scenario]:
    """Read a ``.yaml``, ``.yml`` or ``.jsonl`` file: a list of mappings, or one object in each line.

    Each has ``name`` and ``description``, and may have ``pairs`` (else the argument), ``questions`` (texts)
    and ``criterion`` (by default that of the benchmark's scenario of this name, or ``harm``).

    Raises:
        InputError: the message names the file, the scenario and the field.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise InputError(f"scenario_file={path}: is no file")
    parse = partial(_parsed, pairs=pairs)
    if path.endswith(".jsonl"):
        found = read_records(Path(path), parse).records
    else:
        found = []
        for number, row in enumerate(_yaml_list(path), start=1):
            try:
                found.append(parse(row))
            except ValueError as error:
                raise InputError(f"{path}: scenario {number}: {error}") from None
    for name, count in Counter(scenario.name for scenario in found).items():
        if count > 1:
            raise InputError(f"{path}: the name {name} is used {count} times")
    if not found:
        raise InputError(f"{path}: holds no scenario")
    return found


def _yaml_list(path: str) -> list[Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"scenario_file={path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"scenario_file={path}: cannot be read as text ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}: {f'line {mark.line + 1}: ' if mark else ''}not valid YAML") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a list of scenarios, each with name and description")
    return content


def _parsed(row: Mapping[str, Any], pairs: int) -> Scenario:
    if not isinstance(row, dict):
        raise ValueError("must be a mapping with name and description")
    criterion = CRITERIA.get(str(row.get("name")).strip(), Criterion.HARM)
    try:
        return TypeAdapter(Scenario).validate_python({"pairs": pairs, "criterion": criterion} | row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"field '{field}': {first['msg'].replace('Input should', 'must')}") from None
