"""From what a data file says of an image to the image. Nothing is fetched, and nothing leads out."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mllm_protector.images import EncodedImage, ImageFile, ImageSource
from mllm_protector.reading import text_field

_LONGEST_NAME = 255
"""Bytes of a file's name on the usual file systems."""


class Found(NamedTuple):
    """A question's image, or the reason why there is none; neither where none belongs to it."""

    image: ImageSource | None = None
    missing: str | None = None


def find_image(folder: Path, name: str) -> Found:
    """The image with this name in a folder.

    Raises:
        ValueError: as ``image_file``.
    """
    path = image_file(folder, name)
    return Found(missing=f"no file {name}") if path is None else Found(ImageFile(path))


def image_of(row: Mapping[str, Any], folder: Path, where: str, field: str = "image") -> Found:
    """The image that a row names, or carries as parquet files do (``{"bytes": ...}``).

    Args:
        row: a row whose field may be absent or empty.
        folder: where named images lie.
        where: what an error about the carried bytes calls them.
        field: the field's name.

    Raises:
        ValueError: anything else, or a name as in ``image_file``.
    """
    value = row.get(field)
    if value is None or value == "":
        return Found()
    if isinstance(value, dict):
        data = value.get("bytes")
        if not isinstance(data, bytes) or not data:
            return Found(missing="the row's image is empty")
        return Found(EncodedImage(data, where))
    return find_image(folder, text_field(row, field))


def image_file(folder: Path, name: str) -> Path | None:
    """The file with this name in a folder, or ``None`` if there is none.

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
            return None
        inside = path.resolve().is_relative_to(folder.resolve())
    except OSError as error:
        raise ValueError(f"the image {shown} cannot be looked up ({error.strerror})") from None
    if not inside:
        raise ValueError(f"{name} is a link that leads out of {folder}")
    return path
