"""Records and examples on the disk: made once, and mapped into memory by ``datasets``.

Only what is read takes memory, and all processes share its pages. Everything lies in folders known by all
they were made of, in ``$MLLM_PROTECTOR_CACHE``, else in ``mllm_protector`` beneath the user's cache folder.
They may be removed at any time when nothing runs.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints, overload

import numpy as np
from numpy.typing import NDArray

from mllm_protector.errors import InputError
from mllm_protector.files import content_key, file_digest, fresh_folder, read_json, write_text, writing
from mllm_protector.records import AnswerPair, LabelledAnswer

R = TypeVar("R")
S = TypeVar("S")

BATCH = 1000
"""Rows that are written and read together."""

ROWS, FACTS = "rows.arrow", "facts.json"

VARIABLE = "MLLM_PROTECTOR_CACHE"

ABANDONED = 86_400
"""Seconds without a write after which a half-made folder belongs to a killed run."""


class Table(Sequence[R]):
    """Rows of a ``datasets.Dataset``, each as an object. A slice is a table too, and reads nothing."""

    def __init__(self, rows: Any, make: Callable[..., R]) -> None:
        """Show each row as what ``make`` makes of its columns."""
        self.rows = rows
        self._make = make

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[R]:
        for columns in self.rows.iter(BATCH):
            for values in zip(*columns.values(), strict=True):
                yield self._make(**dict(zip(columns, values, strict=True)))

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> "Table[R]": ...
    def __getitem__(self, index: int | slice) -> "R | Table[R]":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._make(**self.rows[index])

    def take(self, places: NDArray[np.int64]) -> "Table[R]":
        """The rows at these places, in this order, some perhaps several times. Reads nothing."""
        return Table(self.rows.select(places), self._make)


def record(**columns: Any) -> AnswerPair | LabelledAnswer:
    """A row of a table of records; of a mixture's two kinds the other one's columns are empty."""
    kind = LabelledAnswer if columns.get("answer") is not None else AnswerPair
    return kind(**{name: columns[name] for name in kind.__dataclass_fields__})


def records_table(records: Sequence[Any]) -> Table[Any]:
    """Records of one kind as a table; what is not a table yet is held in memory."""
    import datasets

    if isinstance(records, Table):
        return records
    kind = type(records[0]) if records else AnswerPair
    return Table(datasets.Dataset.from_dict(_columns(records, kind), features=_features(kind)), record)


def joined(tables: Iterable[Table[R]]) -> Table[R]:
    """Tables of records, one after the other."""
    import datasets

    return Table(datasets.concatenate_datasets([table.rows for table in tables]), record)  # type: ignore[arg-type]


def in_batches(items: Iterable[S]) -> Iterator[list[S]]:
    """Lists of ``BATCH`` items; the last one may be shorter."""
    waiting = iter(items)
    while some := list(islice(waiting, BATCH)):
        yield some


def write_table(folder: Path, items: Iterable[Any], kind: type | None = None) -> None:
    """Write dataclasses of one kind, by default that of the first, as they come."""
    from datasets.arrow_writer import ArrowWriter

    batches = in_batches(items)
    some = next(batches, [])
    kind = kind or (type(some[0]) if some else AnswerPair)
    with ArrowWriter(path=str(folder / ROWS), features=_features(kind)) as writer:
        while some:
            writer.write_batch(_columns(some, kind))
            some = next(batches, [])
        writer.finalize()


def write_facts(folder: Path, **facts: Any) -> None:
    """Write further facts about a table, as JSON, and its hash."""
    # In ASCII, so that half a surrogate pair in a bad row survives as an escape.
    write_text(folder / FACTS, json.dumps({**facts, "sha256": file_digest(folder / ROWS)}) + "\n")


def open_table(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The rows of a table as a ``datasets.Dataset``, and its facts; an ``InputError`` if it is damaged."""
    import datasets

    try:
        facts = read_json(folder / FACTS)
        if file_digest(folder / ROWS) != facts["sha256"]:
            raise ValueError(f"{ROWS} is not what was written")
        return datasets.Dataset.from_file(str(folder / ROWS)), facts
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"{folder}: damaged ({error}); remove this folder, it will be made again") from error


def _columns(items: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    return {name: [getattr(item, name) for item in items] for name in get_type_hints(kind)}


def _features(kind: type) -> Any:
    from datasets import Features, List, Value

    text = Value("large_string")
    columns: dict[Any, Any] = {
        str: text,
        str | None: text,
        bool: Value("bool"),
        float: Value("float64"),
        list[int]: List(Value("int32")),
    }
    return Features({name: columns[hint] for name, hint in get_type_hints(kind).items()})


def cache_folder() -> Path:
    """Where everything lies; it need not exist."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_protector"


def code_digest(*modules: ModuleType) -> str:
    """A hash of modules' source: what another version of them made is another content."""
    return content_key([file_digest(Path(str(module.__file__))) for module in modules])


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of this kind and key (``content_key``), which ``make`` fills: whole or not at all.

    Several processes may make the same at once: the first one to finish is used by all.

    Raises:
        RunError: it cannot be written.
    """
    folder = cache_folder() / kind / key
    if folder.is_dir():
        return folder
    with writing(f"{folder}: the cache ({VARIABLE} names its place)"):
        _remove_abandoned(folder.parent)
        with fresh_folder(folder) as fresh:
            make(fresh)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def _remove_abandoned(folder: Path) -> None:
    for rest in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            newest = max(path.stat().st_mtime for path in [rest, *rest.iterdir()])
            if time.time() - newest > ABANDONED:
                shutil.rmtree(rest, ignore_errors=True)
