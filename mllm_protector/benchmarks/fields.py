"""Fields of rows: ids, names and images. Nothing is fetched, and no image leads out of its folder."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mllm_protector.images import EncodedImage, ImageFile, ImageSource
from mllm_protector.reading import text_field

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
    """The image that a row names, or carries as parquet files do (``{"bytes": ...}``).

    Args:
        row: a row whose field may be absent or empty.
        name: of the field.
        folder: where named images lie.
        where: what an error about carried bytes calls them.

    Raises:
        ValueError: anything else, or a name as in ``find_image``.
    """
    value = row.get(name)
    if value is None or value == "":
        return Found()
    if isinstance(value, dict):
        data = value.get("bytes")
        if not isinstance(data, bytes) or not data:
            return Found(missing="the row's image is empty")
        return Found(EncodedImage(data, where))
    return find_image(folder, text_field(row, name))
