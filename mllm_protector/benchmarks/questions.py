"""Any set of questions, read by its columns: harmful ones to judge, harmless ones, or both.

A published set is a YAML file that names its columns; see ``configs/benchmark/mossbench.yaml``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, get_args

from mllm_protector.benchmarks.roles import ROLES, Columns, Item, RowParser, require_named
from mllm_protector.benchmarks.scoring import Scorer
from mllm_protector.benchmarks.shared import (
    check_limit,
    check_names,
    files_digest,
    question_digest,
    sample,
    with_images,
)
from mllm_protector.benchmarks.yes_no import yes_no_metrics
from mllm_protector.data.hub import hub_rows, local_files, require_commit
from mllm_protector.errors import InputError
from mllm_protector.protocols import Card
from mllm_protector.ranges import Seed
from mllm_protector.reading import collect
from mllm_protector.records import BENIGN, VARIANTS, LoadedBenchmark, Question, Variant
from mllm_protector.rows import BYTE_ORDER_MARK, Row, parse_json_line, read_rows

OF_PART = ("files", "subset", "split", "columns", "fixed", "where")
"""What a part of a set may say for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFile:
    """Questions in JSONL, JSON, CSV or parquet files or on the hub; cheap until they are loaded.

    A ``.json`` file may also be an object of rows by id. Only ``question`` is required of a row,
    and it may be empty beside an image:

    - ``id``: otherwise the row's number, from 1;
    - ``context``: a text put before the question;
    - ``image``: a file's name, in parquet and on the hub also the bytes; of a list of columns the first that
      is there;
    - ``variant``: TEXT, SD, TYPO or SD_TYPO; otherwise SD with an image, else TEXT;
    - ``options``: a list of texts, put behind the question with letters;
    - ``answers``: what is right, for the scorer;
    - ``scenario`` (otherwise ``all``; ``Benign`` for harmless questions) and ``criterion`` (otherwise
      ``harm``). With a scorer every question is harmless, and its scenario is a category of ``metrics``;
    - ``harmless``: whether the question is (true/false, 1/0); it is then not judged for harm;
    - ``twin``: what one unsafe question and its safe counterpart share;
    - ``base``: what questions share whose answers are not independent (not with a scorer);
    - ``pair``: what two yes-or-no questions about one image share, for MME's accuracy+.

    A column may be a name built of several fields, as ``{folder}/{id}.jpg``; ``{file}`` is the name of the
    row's file. A dot leads into an object, as in ``metadata.type``, and in a list to the first object that
    has the field.

    Attributes:
        path: a file, or a folder with files; ``None`` takes the hub.
        files: which files of a folder, in sorted order.
        name: of the set on the hub.
        revision: the full hash of a commit there.
        subset: of the set there.
        split: of the set there.
        columns: the file's own name for each of ``ROLES``; ``None`` is the same name.
        fixed: role -> the value that every row has.
        where: only the rows with these values in these fields; a list has several; case does not matter.
        parts: name -> what is different in a part of the set (``OF_PART``); columns and fixed values are
            added to those of the whole. The part's name stands before its ids.
        scorer: how answers of harmless questions are compared with the known ones; see ``scoring``.
        instruction: how to answer; follows each question on its own line.
        images: the folder of the images; ``None`` takes ``path``, or its folder.
        variants: those that are asked.
        limit: at most this many questions, drawn with ``seed``; both of a pair of twins, or none.
        seed: of the draw.

    Raises:
        InputError: an unknown role, part, scorer or variant, a limit below 1, or no place to read.
    """

    path: str | None = None
    files: str = "*"
    name: str | None = None
    revision: str | None = None
    subset: str = ""
    split: str = "train"
    columns: Columns = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scorer: Scorer | None = None
    instruction: str = ""
    images: str | None = None
    variants: Sequence[Variant] = VARIANTS
    limit: int | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        for key in ("columns", "fixed"):
            if given := getattr(self, key):
                check_names(key, given, ROLES)
        for role, columns in self.columns.items():
            if role != "image" and not isinstance(columns, str | None):
                raise InputError(f"columns.{role}: must be one name; only the image may have several")
        for name, part in self.parts.items():
            check_names(f"parts.{name}", part, OF_PART)
        if self.scorer is not None:
            check_names("scorer", [self.scorer], get_args(Scorer))
        check_names("variants", self.variants, VARIANTS)
        check_limit(self.limit)
        if self.path is None and self.name is None:
            raise InputError("path: has no value; give a file or a folder, or the `name` of a set on the hub")

    def load(self) -> LoadedBenchmark:
        """The questions in the files' order; one whose image is not there is named in ``missing``.

        Raises:
            InputError: a file or folder that is missing or broken; ``file:line: reason`` for a bad row, such
                as one with a repeated id or an image that leads out of its folder; a named column that no
                row has; ``where`` fits no row; an id in two files; more than two twins.
        """
        if self.images is not None and not Path(self.images).is_dir():
            raise InputError(f"images={self.images}: no such folder")
        fields: set[str] = set()
        parts = {name: (part, [*part._items(name, fields)]) for name, part in self._parts()}
        for name, (part, items) in parts.items():
            key = f"parts.{name}." if name else ""
            require_named(key, self.path or str(self.name), part.columns, part.where, fields)
            if not items:
                wanted = ", ".join(f"{field}={value}" for field, value in part.where.items())
                raise InputError(f"{key}where: no row has {wanted}")
        read = [item for _, items in parts.values() for item in items]
        _require_single_ids(read)
        _require_pairs(read)
        items = [item for item in read if item.question.variant in self.variants]
        chosen = sample(items, self.limit, self.seed, lambda item: item.question.twin or item.question.id)
        place = self.path or str(self.name)
        loaded = with_images(place, ((item.question, item.found) for item in chosen))
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
            "fixed": dict(self.fixed),
            "parts": {name: dict(part) for name, part in self.parts.items()},
            "scorer": self.scorer,
            "instruction": self.instruction,
        }
        given = {name: value for name, value in settings.items() if value}
        return Card(identity={"name": "questions", "questions": self._digest()} | given)

    def _digest(self) -> str:
        if self.path is None:
            return f"{self.name}@{require_commit(str(self.name), self.revision)} {self.subset}/{self.split}"
        root = Path(self.path)
        if not root.is_dir():
            return question_digest(root)
        return files_digest({file for _, part in self._parts() for file in part._local()}, root)

    def _parts(self) -> Iterator[tuple[str, "QuestionFile"]]:
        """The name of each part, and the part as a set of its own; else the whole without a name."""
        if not self.parts:
            yield "", self
        for name, part in self.parts.items():
            added = {key: {**getattr(self, key), **part.get(key, {})} for key in ("columns", "fixed")}
            yield name, replace(self, parts={}, **{**part, **added})

    def _local(self) -> list[Path]:
        return local_files(self.path or "", self.files)

    def _items(self, part: str, fields: set[str]) -> Iterator[Item]:
        """The items of a set without parts; the name of the part stands before the ids.

        The names of all rows' fields are added to ``fields``.
        """
        parser = RowParser(
            columns=self.columns,
            fixed=self.fixed,
            where=self.where,
            scorer=self.scorer,
            instruction=self.instruction,
        )
        numbers = count(1)
        folder = Path(self.images or self.path or ".")
        folder = folder if folder.is_dir() else folder.parent
        for source, file, rows in self._sources():

            def parse(row: Mapping[str, Any], source: str = source, file: str = file) -> Item:
                return parser(row, number=next(numbers), file=file, folder=folder, source=source)

            for item in collect(rows, source, parse, key=lambda item: item.question.id).records:
                name = f"{part}/{item.question.id}" if part else item.question.id
                yield item._replace(question=replace(item.question, id=name))
        fields |= parser.fields

    def _sources(self) -> Iterator[tuple[str, str, Iterator[Row]]]:
        """What errors call each file, its name without the ending, and its rows."""
        if self.path is None:
            name, revision = str(self.name), require_commit(str(self.name), self.revision)
            options = {"name": self.subset} if self.subset else {}
            yield f"{name}@{revision[:7]}", self.split, hub_rows(name, revision, self.split, options)
            return
        for file in self._local():
            rows = _rows_by_id(file) or read_rows(file)
            yield str(file), file.name.partition(".")[0], chain(rows)


def _require_single_ids(items: Sequence[Item]) -> None:
    counts = Counter(item.question.id for item in items)
    if again := next((name for name, number in counts.items() if number > 1), None):
        raise InputError(
            f"columns.id: two files have a question {again!r}; build ids that differ, such as "
            "columns: {id: '{file}/{id}'}"
        )


def _require_pairs(items: Sequence[Item]) -> None:
    kinds = Counter((each.twin, each.scenario == BENIGN) for each in (item.question for item in items))
    for (twin, harmless), number in kinds.items():
        if twin is not None and number > 1:
            kind = "harmless" if harmless else "unsafe"
            raise InputError(f"columns.twin: {twin!r} stands at {number} {kind} questions; a pair has one")


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
