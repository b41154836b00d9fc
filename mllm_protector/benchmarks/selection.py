"""What the benchmarks share: checking settings, choosing questions, knowing files by their content."""

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mllm_protector.benchmarks.fields import Found
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest
from mllm_protector.records import LoadedBenchmark, Question

log = logging.getLogger(__name__)

T = TypeVar("T")


def check_names(key: str, given: Iterable[str], known: Sequence[str]) -> None:
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


def font_file(font: str | None) -> Path | None:
    """The font's file, if one is named.

    Raises:
        InputError: no such file.
    """
    if font is not None and not Path(font).is_file():
        raise InputError(f"font={font}: no such file")
    return None if font is None else Path(font)


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


def with_images(
    source: Path, items: Iterable[tuple[Question, Found]], groups: Mapping[str, Sequence[str]] | None = None
) -> LoadedBenchmark:
    """The benchmark of these questions with their images. Those without are in ``missing``, and logged."""
    questions, missing = [], []
    for question, found in items:
        if found.missing is None:
            questions.append(replace(question, image=found.image))
        else:
            missing.append(f"{question.id}: {found.missing}")
    if missing:
        total = len(missing) + len(questions)
        log.warning(
            "%s: the images of %d of %d questions are missing, the first is %s",
            source,
            len(missing),
            total,
            missing[0],
        )
    return LoadedBenchmark(questions=questions, missing=missing, groups=groups or {})


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
