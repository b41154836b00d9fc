"""Rows of files to records. The meaning of the records plays no part.

Reading is strict by default: the first line that is broken, incomplete or a duplicate stops the run with
``file:line: reason``. Otherwise such lines are set aside and the counts add up:
read = kept + quarantined + dropped.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mllm_protector.errors import InputError, RecordError
from mllm_protector.files import expand, write_jsonl
from mllm_protector.outputs import probe
from mllm_protector.rows import Row, parse_json_line, read_rows

T = TypeVar("T")

BAD_ROW = {"file", "line", "reason", "raw"}
"""The fields of a bad row."""


class Unwanted(Exception):
    """Raised by a parser for a row that is well formed but not wanted; counted under its message."""


@dataclass(slots=True)
class Account:
    """Where every row went.

    Attributes:
        bad_rows: those that could not be used, each with the fields ``BAD_ROW``.
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


def read_records(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    *,
    key: Callable[[T], Hashable] | None = None,
    strict: bool = True,
) -> Reading[T]:
    """All records of a file of one of the kinds in ``READABLE`` (see ``stream_rows`` and ``read_rows``)."""
    return collect(read_rows(path), str(path), parse, key=key, strict=strict)


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
        key: of two records with equal keys the later is a bad row; ``None`` allows duplicates.
        strict: stop at the first bad row; otherwise set it aside and continue.

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


def required(row: Mapping[str, Any], name: str) -> Any:
    """A value that a row must have.

    Raises:
        ValueError: it has no such field.
    """
    if name not in row:
        raise ValueError(f"missing field '{name}' (found: {quoted_names(row)})")
    return row[name]


def quoted_names(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, in quotes, which show the spaces around a name."""
    return ", ".join(f"'{name}'" for name in row) or "none"


def text_field(row: Mapping[str, Any], name: str, *, allow_empty: bool = False) -> str:
    """A required text of a row.

    Raises:
        ValueError: missing, not a text, empty, or with a NUL character.
    """
    value = required(row, name)
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' must be a text, not {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise ValueError(f"field '{name}' is empty")
    if "\0" in value:
        raise ValueError(f"field '{name}' contains a NUL character")
    return whole_characters(value)


def whole_characters(text: str) -> str:
    """A text that can be encoded: U+FFFD replaces halves of surrogate pairs, which JSON can hold.

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
    value = required(row, name)
    plain = plain_value(value) if isinstance(value, bool | int | float | str) else ""
    flag = {"1": True, "0": False}.get(plain)
    if flag is None:
        raise ValueError(f"field '{name}' must be true or false, not {value!r}")
    return flag


def plain_value(value: object) -> str:
    """A value as text without regard to case, the same for 1, 1.0 and true, and for 0 and false."""
    text = str(value).strip().casefold().removesuffix(".0")
    return {"true": "1", "false": "0"}.get(text, text)


def require_quarantine(quarantine: str, source: str | None) -> None:
    """Check, before the file ``source`` is read, that bad rows can be written and replace nothing else.

    Raises:
        InputError: they cannot, or would replace another file.
    """
    path = expand(quarantine)
    with _writing(quarantine):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe(path.parent)
    if source is not None and path.exists() and expand(source).exists() and path.samefile(expand(source)):
        raise InputError(f"quarantine={quarantine}: is the file that is read; name another one for bad rows")
    if path.exists() and not path.is_file():
        raise InputError(f"quarantine={quarantine}: not a file; name one for bad rows")
    if path.exists() and not _holds_bad_rows(path):
        raise InputError(
            f"quarantine={quarantine}: holds something else than bad rows of an earlier run, and would be "
            "replaced; name another file"
        )


def _holds_bad_rows(path: Path) -> bool:
    try:
        with path.open("rb") as lines:
            return path.stat().st_size > 0 and all(parse_json_line(line).keys() == BAD_ROW for line in lines)
    except (OSError, ValueError):
        return False


def write_quarantine(quarantine: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the bad rows; without any, remove the file of an earlier run.

    Raises:
        InputError: they cannot be written.
    """
    with _writing(quarantine):
        if rows:
            write_jsonl(expand(quarantine), rows)
        else:
            expand(quarantine).unlink(missing_ok=True)


@contextmanager
def _writing(quarantine: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"quarantine={quarantine}: cannot hold the bad rows ({error.strerror})"
        raise InputError(message) from error
