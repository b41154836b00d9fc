"""Atomic writes, JSON, paths and content hashes."""

import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_protector.errors import InputError, RunError, system_error


def content_key(*parts: Any) -> str:
    """A hash of JSON values: 32 hexadecimal digits, equal for equal values only."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand(given: str) -> Path:
    """A path as a user types it, with ``~`` for the home folder."""
    return Path(given).expanduser()


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its pieces, as ``write_bytes`` does."""
    pieces = [text] if isinstance(text, str) else text
    write_bytes(path, (piece.encode() for piece in pieces))


def write_bytes(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all: a crash leaves the old file. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.writelines([content] if isinstance(content, bytes) else content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, to be filled and renamed to it; gone in the end if it was not."""
    fresh = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)  # of a killed process with the same id
    try:
        fresh.mkdir(parents=True)
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL in ASCII (half surrogate pairs survive as escapes), whole or not at all."""
    write_text(path, (json.dumps(row) + "\n" for row in rows))


def read_json(path: Path, *, strict: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        strict: refuse NaN and infinity, which JSON has not, and keys that occur twice in one object.

    Raises:
        InputError: missing, not a file, or not JSON.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), **(_STRICT if strict else {}))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError(f"the key {Counter(key for key, _ in items).most_common(1)[0][0]!r} occurs twice")
    return found


_STRICT: dict[str, Any] = {"parse_constant": _refused, "object_pairs_hook": _unique}


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Wrap a library's writing of files.

    Raises:
        RunError: the files cannot be written. The message is one line that begins with ``what``.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and system_error(error) is None:
            raise
        raise RunError(
            f"{what} cannot be written ({error}); make room or repair the folder, then repeat the command"
        ) from error
