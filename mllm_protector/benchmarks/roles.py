"""One row of a file to one question, by the roles that its columns play."""

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm_protector.benchmarks.scoring import Scorer, known_answer
from mllm_protector.benchmarks.shared import Found, find_image, id_field, image_field
from mllm_protector.benchmarks.yes_no import Known
from mllm_protector.errors import InputError
from mllm_protector.prompts import pieces
from mllm_protector.reading import Unwanted, flag_field, plain_value, text_field
from mllm_protector.records import BENIGN, VARIANTS, Question, Variant
from mllm_protector.scenarios import Criterion

ROLES = (
    *("id", "question", "context", "image", "options", "answers", "scenario", "criterion", "pair"),
    *("variant", "harmless", "twin", "base"),
)

FILE = "file"
"""The field with the name of a row's file, without its ending."""

Columns = Mapping[str, str | Sequence[str] | None]


class Item(NamedTuple):
    """A question without its image, the image, and what its answers are compared with."""

    question: Question
    found: Found
    known: Known | None


class RowParser:
    """Makes questions of rows; ``QuestionFile`` explains and checks the settings."""

    def __init__(
        self,
        *,
        columns: Columns,
        fixed: Mapping[str, Any],
        where: Mapping[str, Any],
        scorer: Scorer | None,
        instruction: str,
    ) -> None:
        images = "fixed.image" if "image" in fixed else columns.get("image") or "image"
        self._images = [images] if isinstance(images, str) else [*images]
        self._columns = {role: str(columns.get(role) or role) for role in ROLES if role != "image"}
        self._columns |= {role: f"fixed.{role}" for role in fixed}
        self._fixed = {f"fixed.{role}": value for role, value in fixed.items()}
        self._where = {
            name: [plain_value(value) for value in (wanted if isinstance(wanted, list | tuple) else [wanted])]
            for name, wanted in where.items()
        }
        names = {*self._columns.values(), *self._images, *self._where}
        self._inner = [name for name in names.difference(self._fixed) if "." in name]
        self._scorer = scorer
        self._instruction = instruction
        self.fields: set[str] = set()
        """The names of the fields of all rows so far."""

    def __call__(self, row: Mapping[str, Any], *, number: int, file: str, folder: Path, source: str) -> Item:
        """The question of a row.

        Args:
            row: the fields.
            number: the row's id if it has none.
            file: the row's field ``FILE`` if it has none.
            folder: where its image lies.
            source: what an error calls the place.

        Raises:
            ValueError: a field is missing or cannot be used.
            Unwanted: ``where`` leaves the row out.
        """
        inner = {name: value for name in self._inner if (value := _inside(row, name)) is not None}
        row = {FILE: file} | inner | dict(row)
        self.fields.update(row)
        row |= self._fixed
        for name, wanted in self._where.items():
            if plain_value(row.get(name)) not in wanted:
                raise Unwanted(f"{name} is not {' or '.join(wanted)}")
        identifier = self._text(row, "id") or str(number)
        options = self._options(row)
        found = self._image(row, folder, f"{source}: id {identifier}")
        scenario = self._text(row, "scenario") or "all"
        known = None
        if self._scorer is not None:
            answer = known_answer(self._scorer, row, self._columns["answers"], options)
            known = Known(answer, scenario, self._text(row, "pair"))
        question = Question(
            id=identifier,
            scenario=BENIGN if known is not None or self._harmless(row) else scenario,
            variant=self._variant(row, has_image=found != Found()),
            text=self._words(row, options, has_image=found != Found()),
            criterion=Criterion(self._one_of(row, "criterion", [*Criterion]) or Criterion.HARM),
            base=(self._text(row, "base") or None) if known is None else None,
            twin=self._text(row, "twin") or None,
        )
        return Item(question, found, known)

    def _text(self, row: Mapping[str, Any], role: str) -> str:
        """A short text that may be absent."""
        return _composed(row, self._columns[role])

    def _one_of(self, row: Mapping[str, Any], role: str, known: Sequence[str]) -> str:
        value = self._text(row, role)
        if value and value not in known:
            name = self._columns[role]
            raise ValueError(f"field '{name}' must be one of {', '.join(known)}, not {value[:40]!r}")
        return value

    def _harmless(self, row: Mapping[str, Any]) -> bool:
        name = self._columns["harmless"]
        return row.get(name) not in (None, "") and flag_field(row, name)

    def _variant(self, row: Mapping[str, Any], *, has_image: bool) -> Variant:
        given = self._one_of(row, "variant", VARIANTS)
        if given and (given == "TEXT") == has_image:
            image = "an" if has_image else "no"
            raise ValueError(f"field '{self._columns['variant']}' is {given}, but there is {image} image")
        named = next((variant for variant in VARIANTS if variant == given), None)
        return named or ("SD" if has_image else "TEXT")

    def _words(self, row: Mapping[str, Any], options: Sequence[str], *, has_image: bool) -> str:
        context = self._columns["context"]
        before = text_field(row, context, allow_empty=True).strip() if row.get(context) else ""
        lettered = [
            f"({letter}) {each}" for letter, each in zip(string.ascii_uppercase, options, strict=False)
        ]
        asked = text_field(row, self._columns["question"], allow_empty=has_image)
        lines = [before, asked, *lettered, self._instruction]
        return "\n".join(line for line in lines if line)

    def _options(self, row: Mapping[str, Any]) -> list[str]:
        name = self._columns["options"]
        values = row.get(name)
        if values is None or values == "":
            return []
        if not isinstance(values, list) or not 2 <= len(values) <= len(string.ascii_uppercase):
            raise ValueError(f"field '{name}' must be a list of 2 to 26 texts")
        return [text_field({name: value}, name) for value in values]

    def _image(self, row: Mapping[str, Any], folder: Path, where: str) -> Found:
        """The first that is there; else what is missing, if any is named."""
        tried = list(self._tried(row, folder, where))
        there = [each for each in tried if each.image is not None]
        return next(iter([*there, *(each for each in tried if each.missing)]), Found())

    def _tried(self, row: Mapping[str, Any], folder: Path, where: str) -> Iterator[Found]:
        for name in self._images:
            if not _is_template(name):
                yield image_field(row, name, folder, where)
            elif path := _composed(row, name):
                yield find_image(folder, path)


def require_named(
    key: str, place: str, columns: Columns, where: Mapping[str, Any], fields: Collection[str]
) -> None:
    """Check that every field which the user named is there in some row; of an image's names, one.

    Raises:
        InputError: one is not; the message begins with ``key``.
    """
    named = {f"columns.{role}": names for role, names in columns.items() if names is not None}
    for what, names in (named | {f"where.{name}": name for name in where}).items():
        every = [names] if isinstance(names, str) else names
        lacking = [next((each for each in _fields(name) if each not in fields), None) for name in every]
        if all(lacking):
            found = ", ".join(f"'{field}'" for field in sorted(fields))
            raise InputError(f"{key}{what}: no row of {place} has a field '{lacking[0]}' (found: {found})")


def _fields(name: str) -> list[str]:
    """The fields of a template, or the one field itself."""
    return [field for _, field in pieces(name) if field] if _is_template(name) else [name]


def _is_template(name: str) -> bool:
    return len(list(pieces(name))) > 1


def _composed(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, or of a template of fields; empty if one of them is absent."""
    parts = list(pieces(name)) if _is_template(name) else [("", name)]
    if any(row.get(part) in (None, "") for _, part in parts if part):
        return ""
    return "".join(text + (id_field(row, part) if part else "") for text, part in parts)


def _inside(row: Mapping[str, Any], name: str) -> Any:
    """The value at ``a.b``: of a list, in the first object that has the field; ``None`` if there is none."""
    value: Any = row
    for part in name.split("."):
        objects = value if isinstance(value, list) else [value]
        value = next((each[part] for each in objects if isinstance(each, Mapping) and part in each), None)
    return value
