"""Results written whole or not at all, JSON, paths, hashes of contents, and what the system refuses."""

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_protector.errors import InputError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room on the disk, or no more allowed."""


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
    """A path as users write it."""
    return Path(given).expanduser()


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a file whole or not at all: a crash leaves the old file.

    Args:
        path: folders that are missing are made.
        text: at once, or in pieces as they come.
    """
    with _replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.writelines([text] if isinstance(text, str) else text)
        out.flush()
        os.fsync(out.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, as ``write_text`` does."""
    with _replacing(path) as temporary, temporary.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


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
        strict: refuse NaN and infinity, which many programs write although JSON has neither, and keys that
            stand twice in one object.

    Raises:
        InputError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), **(_STRICT if strict else {}))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError(f"the key {Counter(key for key, _ in items).most_common(1)[0][0]!r} stands twice")
    return found


_STRICT: dict[str, Any] = {"parse_constant": _refused, "object_pairs_hook": _unique}


def as_row(record: Any) -> dict[str, Any]:
    """A frozen record as a JSON object."""
    return asdict(record)


def system_error(error: Exception) -> str | None:
    """What the system refused, in one line that names the file if it is known; ``None`` for other errors.

    Libraries in Rust (safetensors, tokenizers) have exceptions of their own for it.
    """
    if isinstance(error, OSError):
        number, words = error.errno, error.strerror or str(error)
        if error.filename:
            words = f"{error.filename}: {words}"
        elif number not in FULL:
            return None
    elif found := re.search(r"\(os error (\d+)\)", str(error)):
        number, words = int(found.group(1)), str(error)
    else:
        return None
    advice = "; make room and repeat the command, earlier files are as they were"
    return words + advice * (number in FULL)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Around the writing of files by libraries.

    Raises:
        RunError: they cannot be written, in one line that begins with ``what``.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and system_error(error) is None:
            raise
        raise RunError(
            f"{what} cannot be written ({error}); make room or mend the folder, then repeat the command"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A place beside a file that takes its place at the end, and is gone if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
