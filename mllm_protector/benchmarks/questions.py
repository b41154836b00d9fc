"""Any set of questions, read by its columns: harmful ones to judge, or harmless ones with known answers.

A published set is a YAML file that names its columns; see ``configs/benchmark/pope.yaml``.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mllm_protector.benchmarks.scoring import Scorer, known_answer
from mllm_protector.benchmarks.shared import (
    Found,
    check_limit,
    check_names,
    find_image,
    id_field,
    image_field,
    name_field,
    question_digest,
    sample,
    with_images,
)
from mllm_protector.benchmarks.yes_no import Known, yes_no_metrics
from mllm_protector.errors import InputError
from mllm_protector.prompts import pieces
from mllm_protector.protocols import Card
from mllm_protector.ranges import Seed
from mllm_protector.reading import Unwanted, collect, text_field
from mllm_protector.records import BENIGN, LoadedBenchmark, Question, Variant
from mllm_protector.rows import BYTE_ORDER_MARK, Row, parse_json_line, read_rows
from mllm_protector.scenarios import Criterion

COLUMNS = ("id", "question", "context", "image", "options", "answers", "scenario", "criterion", "pair")
ASKED: tuple[Variant, ...] = ("TEXT", "SD")


class _Item(NamedTuple):
    """A question without its image, the image, and what its answers are compared with."""

    question: Question
    found: Found
    known: Known | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFile:
    """A JSONL, JSON, CSV or parquet file of questions; cheap until it is loaded.

    A ``.json`` file may also be an object of rows by id. Only ``question`` is required of a row:

    - ``id``: otherwise the row's number, from 1;
    - ``context``: a text put before the question;
    - ``image``: a file's name, in parquet also the bytes. With an image the question counts as SD, else as
      TEXT. ``columns`` may build the name of several fields: ``{folder}/{id}.jpg``;
    - ``options``: a list of texts, put behind the question with letters;
    - ``answers``: what is right, for the scorer;
    - ``scenario`` (otherwise ``all``; ``Benign`` for harmless questions) and ``criterion`` (otherwise
      ``harm``). With a scorer every question is harmless, and its scenario is a category of ``metrics``;
    - ``pair``: what two yes-or-no questions about one image share, for MME's accuracy+.

    Attributes:
        path: the file.
        columns: the file's own name for each of ``COLUMNS``; ``None`` is the same name.
        where: only the rows with these texts in these fields.
        scorer: how answers of harmless questions are compared with the known ones; see ``scoring``.
        instruction: how to answer; follows each question on its own line.
        images: the folder of the images; ``None`` takes the file's own.
        variants: questions without an image (TEXT), with one (SD), or both.
        limit: at most this many questions, drawn with ``seed``.
        seed: of the draw.

    Raises:
        InputError: an unknown column, scorer or variant, or a limit below 1.
    """

    path: str
    columns: Mapping[str, str | None] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    scorer: Scorer | None = None
    instruction: str = ""
    images: str | None = None
    variants: Sequence[Variant] = ASKED
    limit: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.columns:
            check_names("columns", self.columns, COLUMNS)
        if self.scorer is not None:
            check_names("scorer", [self.scorer], get_args(Scorer))
        check_names("variants", self.variants, ASKED)
        check_limit(self.limit)

    def load(self) -> LoadedBenchmark:
        """The questions in the file's order; one whose image is not there is named in ``missing``.

        Raises:
            InputError: a file or folder that is missing or broken; ``file:line: reason`` for a bad row, such
                as one with a repeated id or an image that leads out of its folder.
        """
        if self.images is not None and not Path(self.images).is_dir():
            raise InputError(f"images={self.images}: no such folder")
        path = Path(self.path)
        parse = partial(self._parse, count(1))
        rows = _rows_by_id(path) or read_rows(path)
        read = collect(rows, self.path, parse, key=lambda item: item.question.id).records
        items = [item for item in read if item.question.variant in self.variants]
        chosen = sample(items, self.limit, self.seed, lambda item: item.question.id)
        loaded = with_images(path, ((item.question, item.found) for item in chosen))
        if self.scorer is None:
            return loaded
        known = {item.question.id: item.known for item in chosen if item.known is not None}

        def score(question: Question, text: str) -> float:
            return known[question.cluster].answer.score(text)

        metrics = partial(yes_no_metrics, known) if self.scorer == "yes_no" else None
        return replace(loaded, score=score, metrics=metrics)

    @property
    def card(self) -> Card:
        """What the questions depend on, not the selection."""
        settings = {
            "columns": {role: name for role, name in self.columns.items() if name is not None},
            "scorer": self.scorer,
            "instruction": self.instruction,
        }
        given = {name: value for name, value in settings.items() if value}
        return Card(identity={"name": "questions", "questions": question_digest(Path(self.path))} | given)

    def _parse(self, numbers: Iterator[int], row: Mapping[str, Any]) -> _Item:
        number = next(numbers)
        for name, wanted in self.where.items():
            if str(row.get(name)) != wanted:
                raise Unwanted(f"{name} is not {wanted}")
        given = self._column("id")
        identifier = str(number) if row.get(given) in (None, "") else id_field(row, given)
        options = self._options(row)
        found = self._image(row, identifier)
        scenario, criterion = self._text(row, "scenario") or "all", self._text(row, "criterion")
        known = None
        if self.scorer is not None:
            answer = known_answer(self.scorer, row, self._column("answers"), options)
            known, scenario = Known(answer, scenario, self._text(row, "pair")), BENIGN
        question = Question(
            id=identifier,
            scenario=scenario,
            variant="TEXT" if found == Found() else "SD",
            text=self._words(row, options),
            criterion=_criterion(criterion or Criterion.HARM, self._column("criterion")),
        )
        return _Item(question, found, known)

    def _column(self, role: str) -> str:
        return self.columns.get(role) or role

    def _text(self, row: Mapping[str, Any], role: str) -> str:
        """A short text that may be absent."""
        name = self._column(role)
        return "" if row.get(name) in (None, "") else name_field(row, name)

    def _words(self, row: Mapping[str, Any], options: Sequence[str]) -> str:
        context = self._column("context")
        before = text_field(row, context, allow_empty=True).strip() if row.get(context) else ""
        lettered = [
            f"({letter}) {each}" for letter, each in zip(string.ascii_uppercase, options, strict=False)
        ]
        lines = [before, text_field(row, self._column("question")), *lettered, self.instruction]
        return "\n".join(line for line in lines if line)

    def _options(self, row: Mapping[str, Any]) -> list[str]:
        name = self._column("options")
        values = row.get(name)
        if values is None or values == "":
            return []
        if not isinstance(values, list) or not 2 <= len(values) <= len(string.ascii_uppercase):
            raise ValueError(f"field '{name}' must be a list of 2 to 26 texts")
        return [text_field({name: value}, name) for value in values]

    def _image(self, row: Mapping[str, Any], identifier: str) -> Found:
        name, folder = self._column("image"), Path(self.images or Path(self.path).parent)
        parts = list(pieces(name))
        if len(parts) == 1:
            return image_field(row, name, folder, f"{self.path}: id {identifier}")
        if any(row.get(part) in (None, "") for _, part in parts if part is not None):
            return Found()
        return find_image(
            folder, "".join(text + (id_field(row, part) if part else "") for text, part in parts)
        )


def _criterion(value: str, name: str) -> Criterion:
    if value not in list(Criterion):
        raise ValueError(f"field '{name}' must be one of {', '.join(Criterion)}, not {value[:40]!r}")
    return Criterion(value)


def _rows_by_id(path: Path) -> list[Row]:
    """The rows of a ``.json`` file that is one object of rows by id; none if it is anything else."""
    if path.suffix.lower() != ".json":
        return []
    try:
        content = parse_json_line(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except (OSError, ValueError):
        return []
    if not all(isinstance(row, dict) for row in content.values()):
        return []
    return [Row(place, "", value={"id": key} | row) for place, (key, row) in enumerate(content.items(), 1)]
