"""Results that survive a crash: JSONL tables that only grow, one file for each process.

A row is one line, written with a single unbuffered append, so a process that is killed leaves at most one
torn line at the end, which it cuts off when it opens the file again. A row is known by a hash of all that it
depends on: what was made with other settings is never mistaken for what is wanted, and never in the way.

Every process reads the files of all and writes only its own. Of the rows only their places are in memory.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mllm_protector.errors import InputError, RecordError, RunError
from mllm_protector.reading import text_field
from mllm_protector.rows import parse_json_line

T = TypeVar("T")

log = logging.getLogger(__name__)

FAILED = "failed"
"""A row with this field says why there is no result; the next run tries again."""


REASONS_TOLD = 5
"""So many different reasons of failures are told; a broken picture or server has few."""


class Store:
    """The rows of one stage of an evaluation, by content key."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Open the tables in a folder, or prepare a new one; nothing is written before the first row.

        Args:
            folder: holds a ``<process>.jsonl`` for each process that ever wrote to it.
            process: the number of this one.

        Raises:
            RecordError: a broken or repeated row; the message is ``file:line: reason``.
            InputError: a file cannot be read.
        """
        self.path = folder / f"{process}.jsonl"
        others = sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit() and path != self.path)
        self._paths = [self.path, *others]
        self._readers: dict[int, int] = {}
        self._places: dict[bytes, int] = {}  # the place of a row: see _pack
        self._size = 0
        for file, path in enumerate(self._paths):
            if path.exists():
                self._read_index(file, path)

    def __contains__(self, key: str) -> bool:
        """Whether there is a result; a failure is none."""
        place = self._places.get(bytes.fromhex(key))
        return place is not None and _unpack(place)[2]

    def get(self, key: str) -> dict[str, Any] | None:
        """The row with this key, a failure included; ``None`` if there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        file, offset, _ = _unpack(place)
        if file not in self._readers:
            self._readers[file] = os.open(self._paths[file], os.O_RDONLY)
        return json.loads(_line_at(self._readers[file], offset))  # type: ignore[no-any-return]

    def required(self, key: str, identifier: str) -> dict[str, Any]:
        """The row with this key.

        Raises:
            RunError: there is none, although ``identifier`` needs it.
        """
        row = self.get(key)
        if row is None:
            stage = self.path.parent.name
            raise RunError(f"{identifier}: its row in {stage} is missing; start the same command again")
        return row

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; each has its key in the field ``key``.

        Raises:
            RunError: the disk is full, or another process writes to the file. Finished rows stay.
            RuntimeError: a key that has a result already; nothing is written.
        """
        keys = [row["key"] for row in rows]
        if len(set(keys)) < len(keys) or any(key in self for key in keys):
            raise RuntimeError(f"{self.path}: rows that are stored already were made again")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._append(descriptor, rows)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); finished rows are kept,"
                " so mend that and start the same command again"
            ) from error

    def close(self) -> None:
        """Close the files."""
        while self._readers:
            os.close(self._readers.popitem()[1])

    def _append(self, descriptor: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if os.fstat(descriptor).st_size != self._size:
            raise RunError(
                f"{self.path}: changed since this run opened it; stop the other run that writes to it,"
                " then start this one again"
            )
        for row in rows:
            # Half of a surrogate pair, which some servers send, becomes a JSON escape.
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            self._places[bytes.fromhex(row["key"])] = _pack(0, self._size, FAILED not in row)
            self._size += len(line) + 1
        os.fsync(descriptor)

    def _read_index(self, file: int, path: Path) -> None:
        whole = 0
        for number, (row, offset, end) in enumerate(_whole_rows(path), start=1):
            whole = end
            key, finished = bytes.fromhex(row["key"]), FAILED not in row
            if (known := self._places.get(key)) is not None and _unpack(known)[2]:
                if finished and _unpack(known)[0] == file:
                    raise RecordError(
                        f"{path}:{number}: a second row with the key '{row['key']}'; remove one of them"
                    )
                continue
            self._places[key] = _pack(file, offset, finished)
        if file == 0:
            self._size = whole
            if whole < path.stat().st_size:
                log.warning("%s: the last line was torn by a crash and is cut off", path)
                os.truncate(path, whole)


def _pack(file: int, offset: int, finished: bool) -> int:
    """A row's place in one number, because there may be very many."""
    return offset << 17 | file << 1 | finished


def _unpack(place: int) -> tuple[int, int, bool]:
    return place >> 1 & 0xFFFF, place >> 17, bool(place & 1)


def _line_at(descriptor: int, offset: int) -> bytes:
    parts: list[bytes] = []
    while True:
        part = os.pread(descriptor, 65536, offset)
        line, newline, _ = part.partition(b"\n")
        parts.append(line)
        if newline or not part:
            return b"".join(parts)
        offset += len(part)


def _whole_rows(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The row of each whole line, and the offsets in bytes at which that line starts and ends."""
    start = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = parse_json_line(line)
                    bytes.fromhex(text_field(row, "key"))
                except ValueError as error:
                    raise RecordError(
                        f"{path}:{number}: {error}; remove the line, it will be made again"
                    ) from None
                yield row, start, start + len(line)
                start += len(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a stage did.

    Attributes:
        rows: different rows that were wanted.
        new: those that had to be made.
        failed: those that could not be made.
        seconds: of wall time.
    """

    rows: int
    new: int
    failed: int
    seconds: float


def fill(
    store: Store,
    wanted: Sequence[tuple[str, T]],
    work: Callable[[Sequence[T]], Sequence[Mapping[str, Any]]] | None,
    *,
    batch_size: int,
    title: str,
) -> Filled:
    """Compute and append only what is missing.

    Each batch is on disk before the next one starts, so that an interrupted run goes on where it stopped.

    Args:
        store: holds what is there already.
        wanted: keys and items; a key that comes again is the same work and is done once.
        work: turns up to ``batch_size`` items into one row each, in their order; ``None`` does nothing.
        batch_size: at least 1.
        title: of the progress bar (shown on terminals only) and of the line in the log.

    Raises:
        InputError: ``batch_size`` is below 1.
        RunError: the rows cannot be written.
        RuntimeError: ``work`` returned more or fewer rows than asked for; none of that batch is stored.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    start, seen, new, reasons = time.monotonic(), set[bytes](), 0, Counter[str]()
    if work is None:
        return Filled(rows=0, new=0, failed=0, seconds=0.0)
    # disable=None: no bar where nobody is watching
    with tqdm(total=len(wanted), desc=title, unit="row", disable=None) as bar:

        def missing() -> Iterator[tuple[str, T]]:
            for key, item in wanted:
                if (short := bytes.fromhex(key)) in seen:
                    bar.update()
                    continue
                seen.add(short)
                if key in store:
                    bar.update()
                else:
                    yield key, item

        waiting = missing()
        while batch := list(islice(waiting, batch_size)):
            rows = work([item for _, item in batch])
            reasons += _told(title, rows, reasons)
            if len(rows) != len(batch):
                raise RuntimeError(f"{store.path}: {len(rows)} rows were made, {len(batch)} were asked for")
            store.append([{"key": key, **row} for (key, _), row in zip(batch, rows, strict=True)])
            new += len(batch)
            bar.update(len(batch))
    done = Filled(rows=len(seen), new=new, failed=reasons.total(), seconds=time.monotonic() - start)
    log.info(_summary(title, done, reasons))
    return done


def _told(title: str, rows: Sequence[Mapping[str, Any]], before: Counter[str]) -> Counter[str]:
    """The failures of a batch by reason; the first of each reason is told at once, if there are few."""
    counts: Counter[str] = Counter()
    for row in rows:
        if FAILED in row:
            reason = str(row[FAILED]).rpartition(": ")[2]  # what comes before names a file
            if reason not in counts and reason not in before and len(before | counts) < REASONS_TOLD:
                log.warning("%s: %s: %s", title, row.get("question", "a row"), row[FAILED])
            counts[reason] += 1
    return counts


def _summary(title: str, done: Filled, reasons: Counter[str]) -> str:
    line = f"{title}: {done.rows:,} rows, {done.rows - done.new:,} already there"
    if done.new:
        rate = done.new / max(done.seconds, 1e-9)
        line += f", {done.new:,} new in {_short(done.seconds)} s ({_short(rate)}/s)"
    if done.failed:
        told = [f"{count:,} x {reason}" for reason, count in reasons.most_common(REASONS_TOLD)]
        told += ["and others"] if len(reasons) > REASONS_TOLD else []
        line += f"; {done.failed:,} failed ({'; '.join(told)}), the same command tries them again"
    return line


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
