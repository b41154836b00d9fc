"""Which rows of a source are used, and for what: the options that all file sources share.

The rows are read once, into a table on the disk that is found again by all that it was made of. Which of them
are kept, and for which part, are row numbers.
"""

import sys
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mllm_protector import reading
from mllm_protector.data import duplicates, queries, table
from mllm_protector.data.cache import cached, code_digest
from mllm_protector.data.quarantine import require_place, write_bad_rows
from mllm_protector.data.splits import (
    Origin,
    SourceAccount,
    Splits,
    as_json,
    digest,
    held_out,
    make_splits,
)
from mllm_protector.data.table import Rows, Table, write_table
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, expand, read_json, write_json, write_jsonl
from mllm_protector.ranges import Seed
from mllm_protector.reading import Account, parse_json_line
from mllm_protector.records import AnswerPair, LabelledAnswer

T = TypeVar("T", bound=AnswerPair | LabelledAnswer)

Duplicates = Literal["keep", "exact", "near"]
"""What to do with a row that says what an earlier one says: keep it, or drop it, also if it is nearly so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(ABC, Generic[T]):
    """A source of rows that come from files or the hub.

    Attributes:
        path: a local file or folder.
        validation_fraction: share of the records to validate with, strictly between 0 and 1.
        seed: of the split, and of what ``limit`` keeps.
        limit: how many records to keep, chosen before the split; ``None`` keeps all.
        duplicates: ``keep`` keeps every row, ``exact`` only the first of equal ones (see ``distinct``), and
            ``near`` drops what is nearly an earlier row too (see ``duplicates.near_duplicates``).
        quarantine: ``None`` stops at the first bad row; a file collects the bad rows and reading goes on. It
            replaces one of an earlier run and no other file.
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
            require_place(self.quarantine, self.path)

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
        account = _read_account(folder)
        if self.quarantine is not None:
            write_bad_rows(self.quarantine, account.bad_rows)
        rows: Rows[T] = Rows(Table(folder / TABLE), np.arange(account.kept))
        if self.duplicates != "keep":
            rows = rows.take(distinct(np.load(folder / TEXTS), np.load(folder / LABELS), account))
        if self.duplicates == "near":
            first = near_copies(Texts(rows), [folder.name, len(rows)])
            itself = first == np.arange(len(rows))
            if not itself.all():
                account.dropped["near duplicate"] = int((~itself).sum())
                rows = rows.take(np.flatnonzero(itself))
        if self.limit is not None and len(rows) > self.limit:
            account.dropped["over the limit"] += len(rows) - self.limit
            ranks = np.fromiter((digest(self.seed, as_json(record)) for record in rows), np.uint64)
            rows = rows.take(np.sort(np.argsort(ranks, kind="stable")[: self.limit]))
        account.kept = len(rows)
        place = self.path or f"{origin.name}@{str(origin.revision)[:7]}"
        line = f"{place}: {account.summary()}"
        if not len(rows):
            raise InputError(f"{line}; there is nothing to learn from")
        try:
            validates = held_out(rows, self.validation_fraction, self.seed)
        except InputError as error:
            raise InputError(f"{line}; {error}") from None
        train, validation = rows.take(np.flatnonzero(~validates)), rows.take(np.flatnonzero(validates))
        counted = SourceAccount(
            name=origin.name,
            origin=origin,
            read=account.read,
            kept=account.kept,
            quarantined=len(account.bad_rows),
            dropped=dict(account.dropped),
            train=len(train),
            validation=len(validation),
        )
        return make_splits(train, validation, line, [counted])

    def _stored(self, origin: Origin) -> Path:
        """The folder with the table of all records and the account of how they were read."""
        later = {each.name for each in fields(Selection)} - {"path"}
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in later}
        if self.path is not None:
            options["path"] = str(expand(self.path).absolute())
        classes = {
            kind.__module__ for kind in type(self).__mro__ if kind.__module__.startswith("mllm_protector")
        }
        code = code_digest(*(sys.modules[name] for name in sorted(classes)), reading, table)
        key = content_key(type(self).__qualname__, options, asdict(origin), self.strict, code)
        return cached("records", key, self._store)

    def _store(self, folder: Path) -> None:
        account = Account()
        texts, labels = array("Q"), array("B")

        def noted() -> Iterator[T]:
            for record in self.records(account):
                texts.append(digest(0, "\0".join(texts_of(record))))
                labels.append(label_of(record))
                yield record

        write_table(folder / TABLE, noted())
        np.save(folder / TEXTS, np.asarray(texts, np.uint64))
        np.save(folder / LABELS, np.asarray(labels, np.uint8))
        write_jsonl(folder / BAD_ROWS, account.bad_rows)
        write_json(
            folder / ACCOUNT, {"read": account.read, "kept": account.kept, "dropped": dict(account.dropped)}
        )


TABLE, TEXTS, LABELS = "rows.arrow", "texts.npy", "labels.npy"
BAD_ROWS, ACCOUNT = "bad_rows.jsonl", "account.json"


def _read_account(folder: Path) -> Account:
    stored = read_json(folder / ACCOUNT)
    with (folder / BAD_ROWS).open("rb") as lines:
        bad_rows = [parse_json_line(line) for line in lines]
    return Account(stored["read"], stored["kept"], bad_rows, Counter(stored["dropped"]))


def texts_of(record: AnswerPair | LabelledAnswer) -> tuple[str, ...]:
    """The question and its one or two answers."""
    if isinstance(record, AnswerPair):
        return record.query, record.accepted, record.rejected
    return record.query, record.answer


def label_of(record: AnswerPair | LabelledAnswer) -> int:
    """One number for each combination of a record's labels."""
    if isinstance(record, AnswerPair):
        return 2 * record.accepted_harmful + record.rejected_harmful
    return int(record.harmful)


class Texts(Sequence[str]):
    """The words of records, each record's in one text; nothing is kept in memory."""

    def __init__(self, records: Sequence[AnswerPair | LabelledAnswer]) -> None:
        """Of these records."""
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return ("\n".join(texts_of(record)) for record in self._records)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "str | Texts":
        if isinstance(index, slice):
            return Texts(self._records[index])
        return "\n".join(texts_of(self._records[index]))


def distinct(texts: NDArray[np.uint64], labels: NDArray[np.uint8], account: Account) -> NDArray[np.int64]:
    """The places of the records to keep, where texts may stand there several times.

    Equal texts with equal labels are kept once, the first. Where labels differ (several people labelled the
    same answer) the most frequent one wins, and with a tie the text is dropped: it cannot be said what is
    to be learnt.

    Args:
        texts: (N,) a digest of each record's words.
        labels: (N,) below 4.
        account: takes what is dropped.
    """
    _, group = np.unique(texts, return_inverse=True)
    key = group.astype(np.int64) * 4 + labels
    voted, first, votes = np.unique(key, return_index=True, return_counts=True)
    ranked = np.lexsort((-votes, voted // 4))  # by text, the most frequent label first
    leads = np.diff(voted[ranked] // 4, prepend=-1) != 0
    winner, behind = ranked[leads], ranked[~leads]
    best = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    best[voted[winner] // 4] = votes[winner]
    tied = np.zeros(len(best), np.bool_)
    tied[voted[behind][votes[behind] == best[voted[behind] // 4]] // 4] = True
    kept = winner[~tied[voted[winner] // 4]]
    everything = np.bincount(group, minlength=len(best))
    account.dropped.update(
        {
            reason: int(count)
            for reason, count in {
                "exact duplicate": (votes[kept] - 1).sum(),
                "outvoted label": everything[~tied].sum() - votes[kept].sum(),
                "contradictory labels": everything[tied].sum(),
            }.items()
            if count
        }
    )
    places: NDArray[np.int64] = np.sort(first[kept])
    return places


def near_copies(texts: Texts, content: list[Any]) -> NDArray[np.int64]:
    """For each text the place of the first one that it nearly copies; its own if there is none.

    Args:
        texts: of records.
        content: what they are, as JSON: the work of minutes is done once.
    """
    key = content_key(content, code_digest(duplicates, queries))

    def make(folder: Path) -> None:
        np.save(folder / "first.npy", duplicates.near_duplicates(texts, threshold=duplicates.THRESHOLD))

    first: NDArray[np.int64] = np.load(cached("near_duplicates", key, make) / "first.npy")
    return first
