"""What the benchmarks share: checking settings, choosing some of the questions, knowing files by content."""

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mllm_protector.errors import InputError
from mllm_protector.files import file_digest
from mllm_protector.records import LoadedBenchmark

log = logging.getLogger(__name__)

T = TypeVar("T")


def check_names(key: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an empty list, and names that are not known.

    Raises:
        InputError: the message begins with the key and lists what is known.
    """
    if isinstance(given, str) or not given:
        raise InputError(f"{key} must be a list with at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise InputError(f"{key}: no '{name}'.{hint} Known: {', '.join(known)}")


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing.

    Raises:
        InputError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")


def sample(items: Sequence[T], limit: int | None, seed: int, key: Callable[[T], str]) -> list[T]:
    """At most ``limit`` of the items, in their order.

    Which ones depends on their keys and the seed alone: a larger limit keeps what a smaller one took, and
    what else is in the file, or its order, changes little or nothing.
    """
    if limit is None or len(items) <= limit:
        return list(items)

    def lot(index: int) -> str:
        return hashlib.sha256(f"{seed}\0{key(items[index])}".encode()).hexdigest()

    return [items[index] for index in sorted(sorted(range(len(items)), key=lot)[:limit])]


def warn_of_missing(source: Path, loaded: LoadedBenchmark) -> LoadedBenchmark:
    """The benchmark itself, with one line in the log if pictures are missing."""
    if loaded.missing:
        total = len(loaded.missing) + len(loaded.questions)
        log.warning(
            "%s: %d of %d questions have no picture, the first is %s",
            source,
            len(loaded.missing),
            total,
            loaded.missing[0],
        )
    return loaded


def question_digest(file: Path) -> str:
    """The sha256 of a file of questions.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return file_digest(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error


def files_digest(files: Iterable[Path], folder: Path) -> str:
    """The sha256 of files' bytes and of their names within a folder, wherever that lies."""
    return lines_digest(f"{relative(file, folder)} {question_digest(file)}" for file in sorted(files))


def lines_digest(lines: Iterable[str]) -> str:
    """The sha256 of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def relative(file: Path, folder: Path) -> str:
    """A file's name within a folder, with slashes."""
    return file.relative_to(folder).as_posix()
