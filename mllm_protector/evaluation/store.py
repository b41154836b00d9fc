"""Results that survive a crash: append-only JSONL tables, one file for each process.

A row is one line; its ``key`` is a hash of everything it depends on. A killed process leaves at most one torn
line at the end of its file; readers ignore it, and the process cuts it off when it opens the file again.
Every process reads the files of all and writes only its own. Memory holds the rows' places, not the rows.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mllm_protector.errors import InputError, RecordError, RunError
from mllm_protector.progress import Progress, short
from mllm_protector.reading import text_field
from mllm_protector.rows import parse_json_line

T = TypeVar("T")

log = logging.getLogger(__name__)

FAILED = "failed"
"""A row with this field says why there is no result; the next run tries again."""

REASONS_SHOWN = 5
"""Different reasons of failures in the log; a broken image or server has few."""


class Store:
    """Rows by content key, such as those of one stage of an evaluation.

    Attributes:
        lines: rows that were ever written, failures included.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Open the tables ``<process>.jsonl`` in a folder; nothing is written before the first row.

        Raises:
            RecordError: a broken or repeated row; the message is ``file:line: reason``.
            InputError: a file cannot be read.
        """
        self.path = folder / f"{process}.jsonl"
        self.lines = 0
        self._size = 0
        self._readers: dict[Path, int] = {}
        self._places: dict[bytes, tuple[Path, int, int, bool]] = {}  # file, offset, bytes, whether a result
        others = sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit() and path != self.path)
        for path in [self.path, *others]:
            if path.exists():
                self._read_index(path)

    def __contains__(self, key: str) -> bool:
        """Whether there is a result; a failure is none."""
        place = self._places.get(bytes.fromhex(key))
        return place is not None and place[-1]

    def get(self, key: str) -> dict[str, Any] | None:
        """The row with this key, a failure included; ``None`` if there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        path, offset, length, _ = place
        if path not in self._readers:
            self._readers[path] = os.open(path, os.O_RDONLY)
        return json.loads(os.pread(self._readers[path], length, offset))  # type: ignore[no-any-return]

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
            with self.path.open("ab", buffering=0) as file:
                self._append(file.fileno(), rows)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); finished rows are kept,"
                " so mend that and start the same command again"
            ) from error

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
            self._places[bytes.fromhex(row["key"])] = self.path, self._size, len(line), FAILED not in row
            self._size += len(line) + 1
            self.lines += 1
        os.fsync(descriptor)

    def _read_index(self, path: Path) -> None:
        """Remember the place of each whole row; a result counts before a failure."""
        whole = number = 0
        for number, (line, row) in enumerate(_whole_rows(path), start=1):
            key, finished = bytes.fromhex(row["key"]), FAILED not in row
            known = self._places.get(key)
            if known is None or not known[-1]:
                self._places[key] = path, whole, len(line), finished
            elif finished and known[0] == path:
                raise RecordError(
                    f"{path}:{number}: a second row with the key '{row['key']}'; remove one of them"
                )
            whole += len(line)
        self.lines += number
        if path == self.path:
            self._size = whole
            if whole < path.stat().st_size:
                log.warning("%s: the last line was torn by a crash and is cut off", path)
                os.truncate(path, whole)


def _whole_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = parse_json_line(line)
                    bytes.fromhex(text_field(row, "key"))
                except ValueError as error:
                    raise RecordError(
                        f"{path}:{number}: {error}; remove the line, it will be made again"
                    ) from None
                yield line, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a stage did: different rows wanted, rows newly made, rows that failed, wall time in seconds."""

    rows: int = 0
    new: int = 0
    failed: int = 0
    seconds: float = 0.0


def fill(
    store: Store,
    wanted: Sequence[tuple[str, T]],
    work: Callable[[Sequence[T]], Sequence[Mapping[str, Any]]],
    *,
    batch_size: int,
    title: str,
) -> Filled:
    """Compute and append the rows that are missing; each batch is on disk before the next one starts.

    Args:
        store: holds the finished rows.
        wanted: keys and items; a repeated key is the same work and is done once.
        work: turns up to ``batch_size`` items into one row each, in their order.
        batch_size: at least 1.
        title: of the progress bar and of the line in the log.

    Raises:
        RunError: the rows cannot be written.
        RuntimeError: ``work`` returned more or fewer rows than asked for; none of that batch is stored.
    """
    start, reasons = time.monotonic(), Counter[str]()
    items: dict[str, T] = {}
    for key, item in wanted:
        items.setdefault(key, item)
    missing = [key for key in items if key not in store]
    with Progress(title, "row", len(items), done=len(items) - len(missing)) as bar:
        for first in range(0, len(missing), batch_size):
            keys = missing[first : first + batch_size]
            rows = work([items[key] for key in keys])
            _count_failures(title, rows, reasons)
            if len(rows) != len(keys):
                raise RuntimeError(f"{store.path}: {len(rows)} rows were made, {len(keys)} were asked for")
            store.append([{"key": key, **row} for key, row in zip(keys, rows, strict=True)])
            bar.update(len(keys))
    seconds = time.monotonic() - start
    done = Filled(rows=len(items), new=len(missing), failed=reasons.total(), seconds=seconds)
    line = f"{title}: {done.rows:,} rows, {done.rows - done.new:,} already there"
    if done.new:
        rate = done.new / max(seconds, 1e-9)
        line += f", {done.new:,} new in {short(seconds)} s ({short(rate)}/s)"
    if done.failed:
        shown = [f"{count:,} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN)]
        shown += ["and others"] if len(reasons) > REASONS_SHOWN else []
        line += f"; {done.failed:,} failed ({'; '.join(shown)}), the same command tries them again"
    log.info(line)
    return done


def _count_failures(title: str, rows: Sequence[Mapping[str, Any]], reasons: Counter[str]) -> None:
    """Count failures by reason; the first of each is logged at once, if there are few."""
    for row in rows:
        if FAILED in row:
            reason = str(row[FAILED]).rpartition(": ")[2]  # what comes before names a file
            if reason not in reasons and len(reasons) < REASONS_SHOWN:
                log.warning("%s: %s: %s", title, row.get("question", "a row"), row[FAILED])
            reasons[reason] += 1
