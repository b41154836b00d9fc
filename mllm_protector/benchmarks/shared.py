"""What the benchmarks share: checked settings, samples, fields of rows, images, and files known by content.

Nothing is fetched, and no image leads out of its folder.
"""

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from mllm_protector.errors import InputError
from mllm_protector.files import file_digest
from mllm_protector.images import EncodedImage, ImageFile, ImageSource
from mllm_protector.reading import text_field
from mllm_protector.records import LoadedBenchmark, Question

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST = 200
_LONGEST_NAME = 255
"""Bytes of a file's name on the usual file systems."""


def id_field(row: Mapping[str, Any], name: str) -> str:
    """A required id: a whole number or a short text in one line.

    Raises:
        ValueError: missing or anything else.
    """
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return name_field(row, name)


def name_field(row: Mapping[str, Any], name: str) -> str:
    """A required text that fits in a table cell and a line of a file.

    Raises:
        ValueError: missing, empty, long, or with characters that cannot be printed.
    """
    value = text_field(row, name)
    if len(value) > _LONGEST or not value.isprintable():
        raise ValueError(f"field '{name}' must be one printable line of at most {_LONGEST} characters")
    return value


class Found(NamedTuple):
    """A question's image, or the reason why there is none; neither where none belongs to it."""

    image: ImageSource | None = None
    missing: str | None = None


def find_image(folder: Path, name: str) -> Found:
    """The image with this name in a folder.

    Raises:
        ValueError: the name is an address, is no relative path in one line, or leads out of the folder.
    """
    shown = ascii(name) if len(ascii(name)) <= 80 else f"{ascii(name)[:80]}..."
    if "://" in name or name.lower().startswith("data:"):
        raise ValueError(f"an image must be a file, nothing is fetched: {shown}")
    parts = PurePosixPath(name).parts
    if not parts or not name.isprintable() or "\\" in name or name.startswith("/") or ".." in parts:
        raise ValueError(f"an image must be a path within its folder, with slashes: {shown}")
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ValueError(f"the image's name is too long: {shown}")
    path = folder / name
    try:
        if not path.is_file():
            return Found(missing=f"no file {name}")
        inside = path.resolve().is_relative_to(folder.resolve())
    except OSError as error:
        raise ValueError(f"the image {shown} cannot be looked up ({error.strerror})") from None
    if not inside:
        raise ValueError(f"{name} is a link that leads out of {folder}")
    return Found(ImageFile(path))


def image_field(row: Mapping[str, Any], name: str, folder: Path, where: str) -> Found:
    """The image in ``folder`` that a row names, or carries as parquet files do (``{"bytes": ...}``).

    Args:
        row: a row whose field may be absent or empty.
        name: of the field.
        folder: where named images lie.
        where: what an error about carried bytes calls them.

    Raises:
        ValueError: anything else, or a name as in ``find_image``.
    """
    value = row.get(name)
    if value in (None, ""):
        return Found()
    if isinstance(value, dict):
        data = value.get("bytes")
        if not isinstance(data, bytes) or not data:
            return Found(missing="the row's image is empty")
        return Found(EncodedImage(data, where))
    return find_image(folder, text_field(row, name))


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
    """At most ``limit`` of the items, in their order; of those with equal keys all or none.

    Which ones depends on their keys and the seed alone: a larger limit keeps what a smaller one took, and
    what else is in the file, or its order, changes little or nothing.
    """
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(lines_digest([f"{seed}\0{key(item)}"]), []).append(index)
    drawn: list[int] = []
    for lot in sorted(groups):
        if limit is not None and len(drawn) + len(groups[lot]) > limit:
            break
        drawn += groups[lot]
    return [items[index] for index in sorted(drawn)]


def with_images(
    source: Path | str,
    items: Iterable[tuple[Question, Found]],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> LoadedBenchmark:
    """The benchmark of these questions with their images. Those without are in ``missing``, and logged."""
    questions, missing = [], []
    for question, found in items:
        if found.missing is None:
            questions.append(replace(question, image=found.image))
        else:
            missing.append(f"{question.id}: {found.missing}")
    if missing:
        counts = f"{len(missing)} of {len(missing) + len(questions)}"
        log.warning("%s: the images of %s questions are missing, the first is %s", source, counts, missing[0])
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
    return lines_digest(
        f"{file.relative_to(folder).as_posix()} {question_digest(file)}" for file in sorted(files)
    )


def lines_digest(lines: Iterable[str]) -> str:
    """The sha256 of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
