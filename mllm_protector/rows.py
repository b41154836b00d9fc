"""Files to rows: JSONL (also packed), JSON, CSV and parquet. The meaning of the rows plays no part."""

import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm_protector.errors import InputError

READABLE = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet")
"""The endings that ``read_rows`` understands."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


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


def read_rows(path: Path, *, texts_only: bool = False) -> Iterator[Row]:
    """The rows of a file of one of the kinds in ``READABLE``; blank lines of JSONL are none.

    A ``.json`` file holds an array of objects, and is read whole, or an object on each line.

    Args:
        path: the file.
        texts_only: leave columns of parquet that hold bytes, such as images, on the disk.

    Raises:
        InputError: the file is missing, empty, damaged, or of another kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, a file is wanted' if path.is_dir() else 'no such file'}")
    kinds: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".json": _json_or_array_rows,
        ".csv": _csv_rows,
        ".parquet": partial(_parquet_rows, texts_only=texts_only),
    }
    ending = next((each for each in READABLE if path.name.lower().endswith(each)), None)
    row = None
    try:
        with path.open("rb") as file:
            if file.read(2) in UTF_16_MARKS:
                raise InputError(f"{path}: is UTF-16, and UTF-8 is wanted; save it as UTF-8")
        if ending is None:
            raise InputError(f"{path}: unknown kind of file; use one of {', '.join(READABLE)}")
        for row in kinds.get(ending, _json_rows)(path):
            yield row
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read to the end ({error})") from error
    if row is None:
        raise InputError(f"{path}: the file is empty")


def parse_json_line(line: bytes) -> dict[str, Any]:
    """One line of JSONL as an object.

    Raises:
        ValueError: the reason, in words.
    """
    value = _parse_json(line.rstrip(b"\r\n"))
    if not isinstance(value, dict):
        raise ValueError(_no_object(value))
    return value


def _no_object(value: Any) -> str:
    return f"must be a JSON object, not {type(value).__name__}"


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


def _json_or_array_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        if not file.read(1000).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from _json_rows(path)
            return
    try:
        items = _parse_json(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield Row(number, json.dumps(item), value=item)
        else:
            yield Row(number, json.dumps(item), problem=_no_object(item))


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 pass as escapes, so that their row can be named.
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
