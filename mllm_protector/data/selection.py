"""Which rows of files are used, and for what: the options that all file sources share.

The rows are read once into a table on the disk, which is found again by all that it was made of. Which of
them are kept, and for which part, are row numbers.
"""

import sys
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from mllm_protector import reading, rows
from mllm_protector.data import duplicates, queries, table
from mllm_protector.data.duplicates import distinct, label_of, text_of
from mllm_protector.data.queries import digest
from mllm_protector.data.splits import Origin, SourceAccount, Splits, T, as_json, held_out, make_splits
from mllm_protector.data.table import Table, cached, code_digest, open_table, record, write_facts, write_table
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, expand, write_jsonl
from mllm_protector.outputs import probe
from mllm_protector.ranges import Seed
from mllm_protector.reading import Account
from mllm_protector.rows import parse_json_line

Duplicates = Literal["keep", "exact", "near"]
"""Which rows go: none, later ones that equal an earlier one, or also those that nearly do."""

TEXTS, LABELS = "texts.npy", "labels.npy"
BAD_ROW = {"file", "line", "reason", "raw"}
"""The fields of a bad row (see ``reading.Account``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(ABC, Generic[T]):
    """A source of rows that come from files or the hub.

    Attributes:
        path: a local file or folder.
        validation_fraction: share of the records to validate with, strictly between 0 and 1.
        seed: of the split, and of what ``limit`` keeps.
        limit: how many records to keep, chosen before the split; ``None`` keeps all.
        duplicates: ``keep`` keeps every row, ``exact`` the first of equal ones (see ``duplicates.distinct``),
            and ``near`` drops what is nearly an earlier row too (see ``duplicates.near_duplicates``).
        quarantine: ``None`` stops at the first bad row; a file collects the bad rows, and reading continues.
            It replaces the bad rows of an earlier run and no other file.
    """

    path: str | None
    validation_fraction: float
    seed: Seed
    limit: int | None
    duplicates: Duplicates
    quarantine: str | None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: naming the option.
        """
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction={self.validation_fraction}: must lie between 0 and 1")
        if self.limit is not None and self.limit < 2:
            raise InputError(f"limit={self.limit}: must be at least 2, one record for each split")
        if self.quarantine is not None:
            _require_place(self.quarantine, self.path)

    @abstractmethod
    def origin(self) -> Origin:
        """Where the rows come from, found without reading them."""

    @abstractmethod
    def records(self, account: Account) -> Iterator[T]:
        """The rows as records, one after the other, each row counted in ``account``."""

    @property
    def strict(self) -> bool:
        """Whether the first bad row stops the reading."""
        return self.quarantine is None

    def load(self) -> Splits[T]:
        """Read, drop what is not wanted, split by query, and give account.

        Raises:
            InputError: nothing usable is there, or all records ask the same.
            RecordError: a row is bad and no quarantine was given.
            RunError: the cache cannot be written.
        """
        origin = self.origin()
        folder = self._stored(origin)
        stored, facts = open_table(folder)
        dropped = Counter(facts["dropped"])
        if self.quarantine is not None:
            _write_bad_rows(self.quarantine, facts["bad_rows"])
        kept: Table[Any] = Table(stored, record)
        if self.duplicates != "keep":
            kept = kept.take(distinct(np.load(folder / TEXTS), np.load(folder / LABELS), dropped))
        if self.duplicates == "near":
            itself = near_copies(kept, [folder.name, len(kept)]) == np.arange(len(kept))
            dropped["near duplicate"] += int((~itself).sum())
            kept = kept.take(np.flatnonzero(itself))
        if self.limit is not None and len(kept) > self.limit:
            dropped["over the limit"] += len(kept) - self.limit
            ranks = np.fromiter((digest(self.seed, as_json(each)) for each in kept), np.uint64)
            kept = kept.take(np.sort(np.argsort(ranks, kind="stable")[: self.limit]))
        quarantined = len(facts["bad_rows"])
        account = reading.tally(facts["read"], len(kept), quarantined, +dropped)
        line = f"{self.path or f'{origin.name}@{str(origin.revision)[:7]}'}: {account}"
        if not len(kept):
            raise InputError(f"{line}; there is nothing to learn from")
        try:
            validates = held_out(kept, self.validation_fraction, self.seed)
        except InputError as error:
            raise InputError(f"{line}; {error}") from None
        train, validation = kept.take(np.flatnonzero(~validates)), kept.take(np.flatnonzero(validates))
        counted = SourceAccount(
            name=origin.name,
            origin=origin,
            read=facts["read"],
            kept=len(kept),
            quarantined=quarantined,
            dropped=dict(+dropped),
            train=len(train),
            validation=len(validation),
        )
        return make_splits(train, validation, line, [counted])

    def _stored(self, origin: Origin) -> Path:
        """The folder with the table of all records, and how they were read."""
        later = {each.name for each in fields(Selection)} - {"path"}
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in later}
        if self.path is not None:
            options["path"] = str(expand(self.path).absolute())
        classes = {
            kind.__module__ for kind in type(self).__mro__ if kind.__module__.startswith("mllm_protector")
        }
        code = code_digest(*(sys.modules[name] for name in sorted(classes)), reading, rows, table)
        key = content_key(type(self).__qualname__, options, asdict(origin), self.strict, code)
        return cached("records", key, self._store)

    def _store(self, folder: Path) -> None:
        account = Account()
        texts, labels = array("Q"), array("B")

        def noted() -> Iterator[T]:
            for each in self.records(account):
                texts.append(digest(0, text_of(each, "\0")))
                labels.append(label_of(each))
                yield each

        write_table(folder, noted())
        np.save(folder / TEXTS, np.asarray(texts, np.uint64))
        np.save(folder / LABELS, np.asarray(labels, np.uint8))
        write_facts(folder, read=account.read, dropped=dict(account.dropped), bad_rows=account.bad_rows)


def near_copies(records: Table[Any], content: list[Any]) -> NDArray[np.int64]:
    """For each record the place of the first one that it nearly copies; its own if there is none.

    Args:
        records: of any kind.
        content: what they are, as JSON: the work of minutes is done once.
    """
    key = content_key(content, code_digest(duplicates, queries))

    def make(folder: Path) -> None:
        texts = Table(records.rows, lambda **columns: text_of(record(**columns)))
        np.save(folder / "first.npy", duplicates.near_duplicates(texts, threshold=duplicates.THRESHOLD))

    first: NDArray[np.int64] = np.load(cached("near_duplicates", key, make) / "first.npy")
    return first


def _require_place(quarantine: str, source: str | None) -> None:
    """Check, before anything is read, that bad rows can be written and replace nothing else."""
    path = expand(quarantine)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe(path.parent)
    except OSError as error:
        raise _unwritable(quarantine, error) from error
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"quarantine={quarantine}: is no file; name one for bad rows")
    if source is not None and expand(source).exists() and path.samefile(expand(source)):
        raise InputError(f"quarantine={quarantine}: is the file that is read; name another one for bad rows")
    try:
        with path.open("rb") as lines:
            known = path.stat().st_size > 0 and all(parse_json_line(line).keys() == BAD_ROW for line in lines)
    except (OSError, ValueError):
        known = False
    if not known:
        raise InputError(
            f"quarantine={quarantine}: holds something else than bad rows of an earlier run, and would be "
            "replaced; name another file"
        )


def _write_bad_rows(quarantine: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the bad rows and nothing else: where there are none, those of an earlier run go."""
    try:
        if rows:
            write_jsonl(expand(quarantine), rows)
        else:
            expand(quarantine).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(quarantine, error) from error


def _unwritable(quarantine: str, error: OSError) -> InputError:
    return InputError(f"quarantine={quarantine}: cannot hold the bad rows ({error.strerror})")
