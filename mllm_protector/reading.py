"""Rows of files to records. Knows nothing of what the records mean.

Reading is strict by default: the first line that is broken, incomplete or a duplicate stops the run with
``file:line: reason``. Otherwise such lines are set aside and the counts add up:
read = kept + quarantined + dropped.
"""

import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mllm_protector.errors import InputError, RecordError

T = TypeVar("T")

READABLE = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet")
"""The endings that ``read_rows`` understands."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Unwanted(Exception):
    """Raised by a parser for a row that is well formed but not wanted; counted under its message."""


@dataclass(slots=True)
class Account:
    """Where every row went: read = kept + quarantined + dropped.

    Attributes:
        read: rows seen.
        kept: rows that became records.
        bad_rows: rows that could not be used, as ``{"file", "line", "reason", "raw"}``.
        dropped: well-formed rows that were not wanted, counted by reason.
    """

    read: int = 0
    kept: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for the log (see ``tally``)."""
        return tally(self.read, self.kept, len(self.bad_rows), self.dropped)


def tally(read: int, kept: int, quarantined: int, dropped: Mapping[str, int]) -> str:
    """An account in one line, such as ``read 10 = kept 8 + dropped 2 (empty answer: 2)``."""
    line = f"read {read:,} = kept {kept:,}"
    if quarantined:
        line += f" + quarantined {quarantined:,}"
    if dropped:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(dropped).most_common())
        line += f" + dropped {sum(dropped.values()):,} ({reasons})"
    return line


@dataclass(slots=True)
class Reading(Account, Generic[T]):
    """An account with the records that were kept."""

    records: list[T] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its value, or the problem with it.

    Attributes:
        line: from 1; of a CSV record its last line, of parquet and of a JSON array the row.
        raw: the row as text.
        value: the fields, or ``None``.
        problem: why there is no value.
    """

    line: int
    raw: str
    value: Mapping[str, Any] | None = None
    problem: str | None = None


def read_records(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    *,
    key: Callable[[T], Hashable] | None = None,
    strict: bool = True,
) -> Reading[T]:
    """All records of a file of one of the kinds in ``READABLE`` (see ``stream_rows``).

    Raises:
        RecordError: a bad row in strict reading; the message is ``file:line: reason``.
        InputError: the file is missing, empty, or of another kind.
    """
    reading: Reading[T] = Reading()
    reading.records += stream_records(path, parse, reading, key=key, strict=strict)
    return reading


def stream_records(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    account: Account,
    *,
    key: Callable[[T], Hashable] | None = None,
    strict: bool = True,
) -> Iterator[T]:
    """The records of a file one after the other, as ``read_records`` would return them.

    Raises:
        RecordError: a bad row in strict reading; the message is ``file:line: reason``.
        InputError: the file is missing, empty, or of another kind.
    """
    before = account.read
    yield from stream_rows(read_rows(path), str(path), parse, account, key=key, strict=strict)
    if account.read == before:
        raise InputError(f"{path}: the file is empty")


def collect(
    rows: Iterable[Row],
    source: str,
    parse: Callable[[Mapping[str, Any]], T],
    *,
    key: Callable[[T], Hashable] | None = None,
    strict: bool = True,
) -> Reading[T]:
    """All records of rows (see ``stream_rows``)."""
    reading: Reading[T] = Reading()
    reading.records += stream_rows(rows, source, parse, reading, key=key, strict=strict)
    return reading


def stream_rows(
    rows: Iterable[Row],
    source: str,
    parse: Callable[[Mapping[str, Any]], T],
    account: Account,
    *,
    key: Callable[[T], Hashable] | None = None,
    strict: bool = True,
) -> Iterator[T]:
    """Turn rows into records, one after the other.

    Args:
        rows: from anywhere.
        source: what an error calls the place.
        parse: turns one row into a record; raises ``ValueError(reason)`` for a bad row and
            ``Unwanted(reason)`` for one that is fine but not wanted.
        account: every row is counted there.
        key: what makes two records duplicates, and the later one a bad row; ``None`` allows duplicates.
        strict: stop at the first bad row; otherwise set it aside and go on.

    Raises:
        RecordError: a bad row in strict reading; the message is ``source:line: reason``.
    """
    first_seen: dict[Hashable, int] = {}
    for row in rows:
        account.read += 1
        try:
            if row.value is None:
                raise ValueError(row.problem)
            record = parse(row.value)
            if key is not None and (earlier := first_seen.setdefault(key(record), row.line)) != row.line:
                raise ValueError(f"duplicate of line {earlier}")
        except Unwanted as reason:
            account.dropped[str(reason)] += 1
        except ValueError as error:
            if strict:
                raise RecordError(f"{source}:{row.line}: {error}") from None
            account.bad_rows.append({"file": source, "line": row.line, "reason": str(error), "raw": row.raw})
        else:
            account.kept += 1
            yield record


def missing_field(row: Mapping[str, Any], name: str) -> ValueError:
    """The error of a row without a field; quotes show the spaces around a name."""
    return ValueError(f"missing field '{name}' (found: {quoted_names(row)})")


def quoted_names(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, in quotes."""
    return ", ".join(f"'{name}'" for name in row) or "none"


def text_field(row: Mapping[str, Any], name: str, *, allow_empty: bool = False) -> str:
    """A required text of a row.

    Raises:
        ValueError: missing, not a text, empty, or with a NUL character.
    """
    if name not in row:
        raise missing_field(row, name)
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' must be a text, not {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise ValueError(f"field '{name}' is empty")
    if "\0" in value:
        raise ValueError(f"field '{name}' contains a NUL character")
    return whole_characters(value)


def whole_characters(text: str) -> str:
    """A text that can be encoded: U+FFFD stands for halves of surrogate pairs, which JSON can hold.

    Every text passes here where it comes in: from files, and from servers.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def flag_field(row: Mapping[str, Any], name: str) -> bool:
    """A required yes/no of a row: true/false, 1/0, or those as texts (CSV).

    Raises:
        ValueError: missing or anything else.
    """
    if name not in row:
        raise missing_field(row, name)
    value = row[name]
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    flag = known.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if flag is None:
        raise ValueError(f"field '{name}' must be true or false, not {value!r}")
    return flag


def read_rows(path: Path, *, texts_only: bool = False) -> Iterator[Row]:
    """The rows of a file of one of the kinds in ``READABLE``; blank lines of JSONL are none.

    A ``.json`` file holds an array of objects, and is read whole, or an object on each line.

    Args:
        path: the file.
        texts_only: leave columns of parquet that hold bytes, such as pictures, on the disk.

    Raises:
        InputError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        kind = "is a folder, a file is wanted" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {kind}")
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            if file.read(2) in UTF_16_MARKS:
                raise InputError(f"{path}: is UTF-16, and UTF-8 is wanted; save it as UTF-8")
        if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            yield from _json_rows(path)
        elif name.endswith(".json"):
            yield from _array_rows(path) if _is_array(path) else _json_rows(path)
        elif name.endswith(".csv"):
            yield from _csv_rows(path)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(path, texts_only)
        else:
            raise InputError(f"{path}: unknown kind of file; use one of {', '.join(READABLE)}")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read to the end ({error})") from error


def parse_json_line(line: bytes) -> dict[str, Any]:
    """One line of JSONL as an object.

    Raises:
        ValueError: the reason, in words.
    """
    value = _parse_json(line.rstrip(b"\r\n"))
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, not {type(value).__name__}")
    return value


def _parse_json(text: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"field '{twice}' stands there twice")
        return value

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_rows(path: Path) -> Iterator[Row]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix.lower(), open)(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            raw = line.rstrip(b"\r\n").decode("utf-8", errors="replace")
            try:
                yield Row(number, raw, value=parse_json_line(line))
            except ValueError as error:
                yield Row(number, raw, problem=str(error))


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1000).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _array_rows(path: Path) -> Iterator[Row]:
    try:
        items = _parse_json(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield Row(number, json.dumps(item), value=item)
        else:
            problem = f"must be a JSON object, not {type(item).__name__}"
            yield Row(number, json.dumps(item), problem=problem)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 pass as escapes, so that the row they stand in can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        header = reader.fieldnames or []
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise InputError(f"{path}:1: column '{twice[0]}' stands there twice")
        while True:
            line = reader.line_num + 1
            try:
                value = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(line, "", problem=f"not valid CSV ({error})")
                continue
            raw = json.dumps(value, default=str)
            if None in value or None in value.values():
                yield Row(reader.line_num, raw, problem="another number of columns than the header")
            elif any("\udc80" <= character <= "\udcff" for text in value.values() for character in text):
                yield Row(reader.line_num, raw, problem="not UTF-8")
            else:
                yield Row(reader.line_num, raw, value=value)


def _parquet_rows(path: Path, texts_only: bool) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None
    columns = [column.name for column in table.schema_arrow if not (texts_only and _holds_bytes(column.type))]
    number = 0
    for batch in table.iter_batches(columns=columns):
        for value in batch.to_pylist():
            number += 1
            yield Row(number, str(value), value=value)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
