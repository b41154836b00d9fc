"""Your own questions from a file, with pictures or without."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_protector.benchmarks.fields import checked_name, id_field
from mllm_protector.benchmarks.image_files import Found, image_of
from mllm_protector.benchmarks.selection import (
    check_limit,
    question_digest,
    sample,
    warn_of_missing,
)
from mllm_protector.errors import InputError
from mllm_protector.ranges import Seed
from mllm_protector.reading import read_records, text_field
from mllm_protector.records import LoadedBenchmark, Question
from mllm_protector.scenarios import Criterion


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFile:
    """A JSONL, CSV or parquet file of questions; cheap until it is loaded.

    A row has ``question`` and may have ``id`` (otherwise its number, from 1), ``image`` (a file's name; in
    parquet also the bytes), ``scenario`` (otherwise ``all``; ``Benign`` for harmless questions) and
    ``criterion`` (otherwise ``harm``). A question with a picture counts as SD, one without as TEXT.

    Attributes:
        path: the file.
        images: the folder of the pictures; ``None`` takes the file's own.
        limit: at most this many questions, drawn with ``seed``.
        seed: of the draw.

    Raises:
        InputError: a limit below 1.
    """

    path: str
    images: str | None = None
    limit: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def load(self) -> LoadedBenchmark:
        """The questions in the file's order; one whose picture is not there is named in ``missing``.

        Raises:
            InputError: a file or folder that is missing or broken; ``file:line: reason`` for a bad row, such
                as one with an id that stands there twice or a picture that leads out of its folder.
        """
        path = Path(self.path)
        images = path.parent if self.images is None else Path(self.images)
        if not images.is_dir():
            raise InputError(f"images={images}: no such folder")
        reading = read_records(path, _Parser(path, images), key=lambda row: row[0].id)
        questions: list[Question] = []
        missing: list[str] = []
        for question, found in sample(reading.records, self.limit, self.seed, lambda row: row[0].id):
            if found.missing is None:
                questions.append(question)
            else:
                missing.append(f"{question.id}: {found.missing}")
        return warn_of_missing(path, LoadedBenchmark(questions=questions, missing=missing))

    def identity(self) -> dict[str, Any]:
        """What the questions depend on, not the selection."""
        return {"name": "questions", "questions": question_digest(Path(self.path))}


@dataclass(slots=True)
class _Parser:
    """Turns rows into questions and counts them."""

    path: Path
    images: Path
    rows: int = field(default=0, init=False)

    def __call__(self, row: Mapping[str, Any]) -> tuple[Question, Found]:
        self.rows += 1
        identifier = str(self.rows) if row.get("id") in (None, "") else id_field(row, "id")
        found = image_of(row, self.images, f"{self.path}: id {identifier}")
        question = Question(
            id=identifier,
            scenario=checked_name(_optional(row, "scenario", "all"), "field 'scenario'"),
            variant="TEXT" if found == Found() else "SD",
            text=text_field(row, "question"),
            image=found.image,
            criterion=_criterion(_optional(row, "criterion", Criterion.HARM)),
        )
        return question, found


def _optional(row: Mapping[str, Any], name: str, default: str) -> str:
    return default if row.get(name) in (None, "") else text_field(row, name)


def _criterion(value: str) -> Criterion:
    if value not in list(Criterion):
        raise ValueError(f"field 'criterion' must be one of {', '.join(Criterion)}, not {value[:40]!r}")
    return Criterion(value)
