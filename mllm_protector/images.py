"""Images that travel in records: loaded late and safely.

Nothing here ever opens a URL. An image is a small object until ``load`` is called, so a benchmark of
thousands of questions holds no pixels. ``rendering`` draws images from words.
"""

import hashlib
import io
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from mllm_protector.errors import InputError

MAX_PIXELS = 50_000_000
"""An image of more pixels is refused before it is decoded (a few kilobytes can unfold to gigabytes)."""


class ImageSource(Protocol):
    """Something that becomes an RGB image when it is needed."""

    def load(self) -> Image.Image:
        """The image in RGB, or ``InputError`` naming what cannot be read."""

    def digest(self) -> str:
        """A sha256 of what the pixels depend on, found without decoding; ``InputError`` as ``load``."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on disk."""

    path: Path

    def load(self) -> Image.Image:
        """The file's first frame in RGB."""
        return EncodedImage(self._read(), str(self.path)).load()

    def digest(self) -> str:
        """Of the file's bytes."""
        return sha256(self._read())

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot read the image ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image held as the bytes of a JPEG or PNG file, as parquet sets carry it."""

    data: bytes
    name: str

    def load(self) -> Image.Image:
        """The first frame in RGB."""
        if not self.data:
            raise InputError(f"{self.name}: the image file is empty")
        return _decode(lambda: Image.open(io.BytesIO(self.data)), self.name)

    def digest(self) -> str:
        """Of the bytes."""
        return sha256(self.data)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image that is in memory as a PIL image."""

    image: Image.Image

    def load(self) -> Image.Image:
        """The image in RGB."""
        return _decode(lambda: self.image, "the PIL image")

    def digest(self) -> str:
        """Of the pixels."""
        image = self.load()
        return sha256(f"{image.size}\0".encode() + image.tobytes())


def as_image(image: str | PathLike[str] | Image.Image | ImageSource) -> ImageSource:
    """An image from what a user has: a file's path or a PIL image.

    Raises:
        InputError: an address, which is never fetched, no such file, or something else.
    """
    if isinstance(image, Image.Image):
        return LoadedImage(image)
    if isinstance(image, str | PathLike):
        name = textwrap.shorten(str(image), 200, placeholder="...")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            raise InputError(f"image={name}: nothing is fetched from an address; give a file or a PIL image")
        if not Path(image).expanduser().is_file():
            raise InputError(f"image={name}: no such file")
        return ImageFile(Path(image).expanduser())
    if not callable(getattr(image, "load", None)) or not callable(getattr(image, "digest", None)):
        raise InputError(f"image: must be a file's path or a PIL image, not of type {type(image).__name__}")
    return image


def sha256(content: bytes) -> str:
    """The hash by which an image is known."""
    return hashlib.sha256(content).hexdigest()


def _decode(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = opened()
            if (width := image.width) * (height := image.height) > MAX_PIXELS:
                raise InputError(f"{name}: {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
            return _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: more than the {MAX_PIXELS:,} pixels allowed") from error
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        # Only the kind: some messages hold the address of a buffer, which differs from run to run.
        raise InputError(f"{name}: not a readable image ({type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as people see the image: transparent parts white, 16-bit and float greys scaled, not clipped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float64)
        full = 65535.0 if image.mode != "F" else max(float(grey.max()), 1.0)
        return Image.fromarray((grey.clip(0, full) * (255 / full)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        paper = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(paper, seen).convert("RGB")
    return image.convert("RGB")
