"""The data that a training uses, with an account of every row.

A source reads nothing until ``load``. Read = kept + quarantined + dropped, and no query is in two splits. The
rows of a file are read once into a table on the disk; duplicates, limits and splits are row numbers of it.
"""

import difflib
import sys
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from mllm_protector import reading, rows
from mllm_protector.data import duplicates, queries, table, toy
from mllm_protector.data.duplicates import distinct, label_of, text_of
from mllm_protector.data.queries import digest
from mllm_protector.data.splits import Origin, SourceAccount, Splits, T, as_json, held_out, make_splits
from mllm_protector.data.table import Table, cached, code_digest, open_table, record, write_facts, write_table
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, expand, file_digest
from mllm_protector.ranges import Seed
from mllm_protector.reading import (
    Account,
    flag_field,
    require_quarantine,
    stream_rows,
    text_field,
    write_quarantine,
)
from mllm_protector.records import AnswerPair, LabelledAnswer
from mllm_protector.rows import read_rows

Duplicates = Literal["keep", "exact", "near"]
TEXTS, LABELS = "texts.npy", "labels.npy"
HARM_LABELS = ("accepted_harmful", "rejected_harmful")


class Source(Protocol):
    """Something that yields training records."""

    def load(self) -> Splits[Any]:
        """Pairs or labelled answers, read, checked and split.

        Raises:
            InputError: nothing usable is there.
            RecordError: a row is bad and no quarantine was given.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """The embedded toy pairs, with their own training and validation things."""

    def load(self) -> Splits[AnswerPair]:
        """1,000 pairs to train on and 200 to validate with."""
        train, validation = toy.toy_pairs("train"), toy.toy_pairs("validation")
        origin = Origin(name="toy data", licence="Apache-2.0, as this package")
        count = len(train) + len(validation)
        counted = SourceAccount(
            name=origin.name,
            origin=origin,
            read=count,
            kept=count,
            train=len(train),
            validation=len(validation),
        )
        return make_splits(train, validation, f"toy data: {counted.summary()}", [counted])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource(ABC, Generic[T]):
    """A source of rows that come from files or the hub.

    Attributes:
        path: a local file or folder.
        validation_fraction: share of the records to validate with, strictly between 0 and 1.
        seed: of the split, and of the records that ``limit`` keeps.
        limit: how many records to keep, chosen before the split; ``None`` keeps all.
        duplicates: ``keep`` keeps every row, ``exact`` the first of equal ones (see ``duplicates.distinct``),
            and ``near`` drops also rows that nearly repeat an earlier one.
        quarantine: ``None`` stops at the first bad row; a file collects the bad rows, and reading continues.
    """

    path: str | None
    validation_fraction: float
    seed: Seed
    limit: Annotated[int, Interval(ge=2)] | None
    duplicates: Duplicates
    quarantine: str | None

    def __post_init__(self) -> None:
        """Check the options; an ``InputError`` names the one that is out of range."""
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction={self.validation_fraction}: must lie between 0 and 1")
        if self.quarantine is not None:
            require_quarantine(self.quarantine, self.path)

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
        """The records, read, without duplicates, limited and split by query (see ``Source.load``)."""
        origin = self.origin()
        folder = self._stored(origin)
        stored, facts = open_table(folder)
        dropped = Counter(facts["dropped"])
        if self.quarantine is not None:
            write_quarantine(self.quarantine, facts["bad_rows"])
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
        counts: dict[str, Any] = {
            "read": facts["read"],
            "kept": len(kept),
            "quarantined": len(facts["bad_rows"]),
            "dropped": dict(+dropped),
        }
        place = self.path or f"{origin.name}@{str(origin.revision)[:7]}"
        line = f"{place}: {reading.tally(**counts)}"
        if not len(kept):
            raise InputError(f"{line}; there is nothing to learn from")
        try:
            validates = held_out(kept, self.validation_fraction, self.seed)
        except InputError as error:
            raise InputError(f"{line}; {error}") from None
        train, validation = kept.take(np.flatnonzero(~validates)), kept.take(np.flatnonzero(validates))
        counts |= {"train": len(train), "validation": len(validation)}
        counted = SourceAccount(name=origin.name, origin=origin, **counts)
        return make_splits(train, validation, line, [counted])

    def _stored(self, origin: Origin) -> Path:
        """The folder with the table of all records, and how they were read."""
        later = {each.name for each in fields(FileSource)} - {"path"}
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in later}
        if self.path is not None:
            options["path"] = str(expand(self.path).absolute())
        classes = {kind.__module__ for kind in type(self).__mro__}
        ours = sorted(name for name in classes if name.startswith("mllm_protector"))
        code = code_digest(*map(sys.modules.__getitem__, ours), reading, rows, table)
        key = content_key(type(self).__qualname__, options, asdict(origin), self.strict, code)
        return cached("records", key, self._store)

    def _store(self, folder: Path) -> None:
        account = Account()
        texts, labels = array("Q"), array("B")

        def noted() -> Iterator[T]:
            for each in self.records(account):
                texts.append(digest(0, text_of(each)))
                labels.append(label_of(each))
                yield each

        write_table(folder, noted())
        np.save(folder / TEXTS, np.asarray(texts, np.uint64))
        np.save(folder / LABELS, np.asarray(labels, np.uint8))
        write_facts(folder, read=account.read, dropped=dict(account.dropped), bad_rows=account.bad_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFile(FileSource[T]):
    """A file of your own: ``.jsonl`` (also ``.gz`` or ``.xz``), ``.json``, ``.csv`` or ``.parquet``."""

    path: str

    def origin(self) -> Origin:
        """The file."""
        file = expand(self.path)
        digest = file_digest(file) if file.is_file() else ""
        return Origin(name=file.name, licence="your own file: none is known", files={file.name: digest})

    def records(self, account: Account) -> Iterator[T]:
        """Every row of the file."""
        path = expand(self.path)
        return stream_rows(read_rows(path), str(path), self.parse, account, strict=self.strict)

    @abstractmethod
    def parse(self, row: Mapping[str, Any]) -> T:
        """A row as a record; ``ValueError`` says why it cannot be one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(OwnFile[AnswerPair]):
    """Your own pairs, or those that ``scripts/generate_pairs.py`` wrote.

    Attributes:
        path: a file with the fields ``query``, ``accepted`` and ``rejected``, and if you like
            ``accepted_harmful`` (else false), ``rejected_harmful`` (else true) and ``scenario``.
    """

    def parse(self, row: Mapping[str, Any]) -> AnswerPair:
        """A row as a pair."""
        for name in map(str, row):  # a misspelt label would be ignored, and its default used
            if name not in HARM_LABELS and (close := difflib.get_close_matches(name, HARM_LABELS, 1, 0.8)):
                raise ValueError(f"unknown field '{name}': is '{close[0]}' meant?")
        pair = AnswerPair(
            query=text_field(row, "query"),
            accepted=text_field(row, "accepted"),
            rejected=text_field(row, "rejected"),
            accepted_harmful="accepted_harmful" in row and flag_field(row, "accepted_harmful"),
            rejected_harmful="rejected_harmful" not in row or flag_field(row, "rejected_harmful"),
            scenario=_scenario(row),
        )
        if pair.accepted == pair.rejected:
            raise ValueError("fields 'accepted' and 'rejected' are the same text")
        return pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled(OwnFile[LabelledAnswer]):
    """Your own labelled answers, for the detector alone.

    Attributes:
        path: a file with the fields ``query``, ``answer`` and ``harmful``, and if you like ``scenario``.
    """

    def parse(self, row: Mapping[str, Any]) -> LabelledAnswer:
        """A row as a labelled answer."""
        return LabelledAnswer(
            query=text_field(row, "query"),
            answer=text_field(row, "answer"),
            harmful=flag_field(row, "harmful"),
            scenario=_scenario(row),
        )


def _scenario(row: Mapping[str, Any]) -> str | None:
    empty = row.get("scenario") in (None, "")  # such as a cell of a CSV
    return None if empty else text_field(row, "scenario")


def near_copies(records: Table[Any], content: list[Any]) -> NDArray[np.int64]:
    """``near_duplicates`` of records, looked for once; ``content`` is what the records are, as JSON."""
    key = content_key(content, code_digest(duplicates, queries))

    def make(folder: Path) -> None:
        texts = Table(records.rows, lambda **columns: text_of(record(**columns)))
        np.save(folder / "first.npy", duplicates.near_duplicates(texts, threshold=duplicates.THRESHOLD))

    first: NDArray[np.int64] = np.load(cached("near_duplicates", key, make) / "first.npy")
    return first
