"""The common part of the published sets: they are read from local files, else from the hub at one commit.

Either way the columns are compared with the expected ones before the first row becomes a record.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from mllm_protector.data.sources import FileSource
from mllm_protector.data.splits import Origin, T
from mllm_protector.errors import InputError, RecordError
from mllm_protector.files import expand, file_digest
from mllm_protector.reading import Account, Unwanted, flag_field, stream_rows, text_field
from mllm_protector.records import AnswerPair, LabelledAnswer
from mllm_protector.rows import READABLE, Row, read_rows

Values = Mapping[str, Any]
Parser = Callable[[Values], T]

HEAD = 1000
"""Rows by which a layout is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(FileSource[T]):
    """A published set.

    Attributes:
        path: a file, or a folder with files, in the published layout; ``None`` asks the hub.
        pattern: which files of a folder are read, in sorted order.
        name: the set's name.
        revision: the full hash of a commit on the hub; local files need none.
        split: the split of the hub that is read.
        subset: the part of the set that the hub is asked for, as ``subset_option`` of ``load_dataset``.
        licence: as the set states it.
        columns: those that some of the first rows must have; a row without them is then a bad row.
    """

    pattern: str
    name: str
    revision: str | None
    split: str
    subset: str = ""

    licence: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    subset_option: ClassVar[str] = "name"

    @abstractmethod
    def parse(self, row: Values) -> T:
        """A row as a record; ``ValueError`` says why it cannot be one, ``Unwanted`` why it is left out."""

    def parser(self, head: Sequence[Values], source: str) -> Parser[T]:
        """The function that turns a row into a record, chosen by the first rows."""
        require_columns(head, source, self.columns)
        return self.parse

    def unfolded(self, row: Row) -> Iterator[Row]:
        """The rows, one for each record, that a row of the file or the hub stands for."""
        yield row

    def hub_options(self) -> dict[str, Any]:
        """Further arguments of ``datasets.load_dataset``."""
        return {self.subset_option: self.subset} if self.subset else {}

    def origin(self) -> Origin:
        """The set, with its commit on the hub or a hash of each local file."""
        if self.path is not None:
            root, files = expand(self.path), self._files()
            names = {file: str(file.relative_to(root)) if file != root else file.name for file in files}
            digests = {name: file_digest(file) for file, name in names.items()}
            return Origin(name=self.name, licence=self.licence, files=digests)
        require_commit(self.name, self.revision)
        return Origin(name=self.name, licence=self.licence, revision=self.revision)

    def records(self, account: Account) -> Iterator[T]:
        """Every row of every file, or of the hub's split."""
        hub = f"{self.name}@{str(self.revision)[:7]}"
        for file in [None] if self.path is None else self._files():
            source = hub if file is None else str(file)
            given = self._hub_rows() if file is None else read_rows(file, texts_only=True)
            rows = chain.from_iterable(map(self.unfolded, given))
            head = list(islice(rows, HEAD))
            if not head:
                raise InputError(f"{source}: there is no row")
            values = [row.value for row in head if row.value is not None]
            if not values:
                raise RecordError(f"{source}:{head[0].line}: {head[0].problem}; no other row is any better")
            parse = self.parser(values, source)
            yield from stream_rows(chain(head, rows), source, parse, account, strict=self.strict)

    def _files(self) -> list[Path]:
        return local_files(self.path or "", self.pattern, f"; give the `path` of a copy of {self.name}")

    def _hub_rows(self) -> Iterator[Row]:
        options = self.hub_options()
        for row in hub_rows(self.name, self.revision, self.split, options, texts_only=True):
            yield replace(row, raw=str(row.value))


def local_files(path: str, pattern: str, advice: str = "") -> list[Path]:
    """A file, or those of a folder that fit a pattern, in sorted order.

    Raises:
        InputError: there are none; ``advice`` follows where nothing has this path.
    """
    root = expand(path)
    if not root.exists():
        raise InputError(f"{root}: no such file or folder{advice}")
    if not root.is_dir():
        return [root]
    files = sorted(file for file in root.glob(pattern) if file.name.lower().endswith(READABLE))
    if not files:
        raise InputError(f"{root}: no {' or '.join(READABLE)} file there that fits '{pattern}'")
    return files


def require_commit(name: str, revision: str | None) -> str:
    """The revision itself, if it is a full hash.

    Raises:
        InputError: it is not one; a branch moves.
    """
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise InputError(
            f"revision={revision}: give the full hash of a commit of {name} on the hub (40 "
            "digits; a branch moves), or the `path` of a local copy"
        )
    return str(revision)


def hub_rows(
    name: str, revision: str | None, split: str, options: Mapping[str, Any], *, texts_only: bool = False
) -> Iterator[Row]:
    """The rows of a set on the hub at one commit; images stay encoded, as in parquet files.

    Args:
        name: the set's name.
        revision: the commit.
        split: the part that is read.
        options: further arguments of ``datasets.load_dataset``.
        texts_only: leave images out.

    Raises:
        InputError: it cannot be had.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, revision=revision, split=split, **options)
        for column, feature in (getattr(rows, "features", None) or {}).items():
            if isinstance(feature, datasets.Image):
                encoded = rows.cast_column(column, datasets.Image(decode=False))
                rows = rows.remove_columns(column) if texts_only else encoded
        for number, row in enumerate(rows, start=1):
            yield Row(number, "", value=row)
    except Exception as error:  # the hub's client raises many kinds, and no common one
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name}@{str(revision)[:7]}: cannot be had from the hub ({cause}); download the set and give its"
            " `path`"
        ) from error


def columns_of(head: Sequence[Values]) -> list[str]:
    """All columns of some rows."""
    return list(dict.fromkeys(str(name) for row in head for name in row))


def require_columns(head: Sequence[Values], source: str, names: Sequence[str]) -> None:
    """Check that some of these rows have each column; ``InputError`` names what is missing."""
    found = columns_of(head)
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{source}: missing {missing} of the columns {[*names]}; found {found}")


def texts(row: Values, *names: str) -> list[str]:
    """Texts of a row, which may be empty: such a row is not wanted, but it is not bad either."""
    return [text_field(row, name, allow_empty=True) for name in names]


def first_true(row: Values, name: str) -> str | None:
    """The first name in an object of yes/no that is true; a row need not have the object."""
    flags = row.get(name)
    if flags is None:
        return None
    if not isinstance(flags, Mapping):
        raise ValueError(f"field '{name}' must be an object of true and false, not {type(flags).__name__}")
    return next((str(flag) for flag in flags if flags[flag] is not None and flag_field(flags, flag)), None)


def pair(query: str, accepted: str, rejected: str, **known: Any) -> AnswerPair:
    """A pair of stripped texts; ``Unwanted`` if one is empty or both answers are the same."""
    query, accepted, rejected = _filled(query, accepted, rejected)
    if accepted == rejected:
        raise Unwanted("twice the same answer")
    return AnswerPair(query=query, accepted=accepted, rejected=rejected, **known)


def labelled(query: str, answer: str, *, harmful: bool, scenario: str | None = None) -> LabelledAnswer:
    """A labelled answer of stripped texts; ``Unwanted`` if one is empty."""
    query, answer = _filled(query, answer)
    return LabelledAnswer(query=query, answer=answer, harmful=harmful, scenario=scenario)


def _filled(query: str, *answers: str) -> list[str]:
    stripped = [text.strip() for text in (query, *answers)]
    if not all(stripped):
        raise Unwanted("empty answer" if stripped[0] else "empty query")
    return stripped
