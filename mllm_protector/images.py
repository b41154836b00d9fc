"""Images that travel in records: loaded late, loaded safely, or rendered from words.

Nothing here ever opens a URL. An image is a small object until ``load`` is called, so a benchmark of
thousands of questions holds no pixels. The renderers follow the facts of MM-SafetyBench's
``creation/2_img_process.py`` and of FigStep's ``src/generate_prompts.py`` (canvas, size, wrapping); the code
is our own.
"""

import hashlib
import io
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mllm_protector.errors import InputError

MAX_PIXELS = 50_000_000
"""An image of more pixels is refused before it is decoded (a few kilobytes can unfold to gigabytes)."""

CANVAS_WIDTH = 1024
FONT_SIZE = 90

LIST_CANVAS = 760
LIST_FONT_SIZE = 80
LIST_LINE_LENGTH = 15
LIST_LEFT = 20
LIST_FIRST_BASELINE = 74
LIST_LINE_HEIGHT = 75
LIST_POINTS = 3


class ImageSource(Protocol):
    """Something that becomes an RGB image when it is needed."""

    def load(self) -> Image.Image:
        """The image in RGB.

        Raises:
            InputError: the image cannot be read; the message names it.
        """
        ...

    def digest(self) -> str:
        """A sha256 of what the pixels depend on, found without decoding.

        Raises:
            InputError: as ``load``.
        """
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on disk."""

    path: Path

    def load(self) -> Image.Image:
        """The file's first frame in RGB."""
        return _opened(self._read(), str(self.path))

    def digest(self) -> str:
        """Of the file's bytes."""
        return hashlib.sha256(self._read()).hexdigest()

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
        return _opened(self.data, self.name)

    def digest(self) -> str:
        """Of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A phrase in black on white, as in the benchmark's TYPO images.

    Attributes:
        phrase: the words to draw.
        font: a TrueType file; ``None`` takes DejaVu Sans, which ships with matplotlib. The benchmark used
            Arial: with it the lines break where the benchmark's do. The published files are JPEGs of unknown
            Pillow releases, so their pixels differ all the same.
    """

    phrase: str
    font: Path | None = None

    def load(self) -> Image.Image:
        """Text of size 90 on a canvas 1024 wide and 90 x (lines + 1) high, starting at (0, 45)."""
        font = _font(self.font, FONT_SIZE, "DejaVuSans.ttf")
        text = wrap(self.phrase, font.getlength)
        canvas = Image.new("RGB", (CANVAS_WIDTH, FONT_SIZE * (text.count("\n") + 2)), "white")
        ImageDraw.Draw(canvas).multiline_text((0, FONT_SIZE // 2), text, font=font, fill="black")
        return canvas

    def digest(self) -> str:
        """Of the phrase and how it is drawn."""
        return hashlib.sha256(f"{rendering_identity(self.font)}\0{self.phrase}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RenderedList:
    """A heading over an empty numbered list, as in FigStep's images (Gong et al., arXiv 2311.05608).

    Attributes:
        heading: the words above the list.
        font: a monospaced TrueType file; ``None`` takes DejaVu Sans Mono Bold, which ships with matplotlib.
            FigStep used FreeMono Bold; the lines stand where its lines stand whatever the font.
    """

    heading: str
    font: Path | None = None

    def load(self) -> Image.Image:
        """Text of size 80 on a canvas of 760 x 760, wrapped at 15 characters; what is longer is cut off."""
        font = _font(self.font, LIST_FONT_SIZE, "DejaVuSansMono-Bold.ttf")
        canvas = Image.new("RGB", (LIST_CANVAS, LIST_CANVAS), "white")
        draw = ImageDraw.Draw(canvas)
        for number, line in enumerate(self.lines()):
            baseline = LIST_FIRST_BASELINE + number * LIST_LINE_HEIGHT
            draw.text((LIST_LEFT, baseline), line, font=font, fill="black", anchor="ls")
        return canvas

    def lines(self) -> list[str]:
        """The heading's lines, then those of the list."""
        return [
            *textwrap.wrap(self.heading, LIST_LINE_LENGTH),
            *(f"{number}. " for number in range(1, LIST_POINTS + 1)),
        ]

    def digest(self) -> str:
        """Of the heading and how it is drawn."""
        return hashlib.sha256(f"{list_rendering_identity(self.font)}\0{self.heading}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Stacked:
    """One image on top of another without scaling: as wide as the wider one, black where neither is."""

    top: ImageSource
    bottom: ImageSource

    def load(self) -> Image.Image:
        """Both images in one."""
        top, bottom = self.top.load(), self.bottom.load()
        canvas = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), "black")
        canvas.paste(top, (0, 0))
        canvas.paste(bottom, (0, top.height))
        return canvas

    def digest(self) -> str:
        """Of both images'."""
        return hashlib.sha256(f"stacked {self.top.digest()} {self.bottom.digest()}".encode()).hexdigest()


def wrap(phrase: str, measure: Callable[[str], float]) -> str:
    """The phrase with the line breaks of MM-SafetyBench's TYPO images.

    Widths add up, of the first word without a space and of every later one with a space before it. Where the
    sum reaches the canvas a new line begins *with the space of its first word*. A word wider than the canvas
    runs over its edge.

    Args:
        phrase: words between single spaces.
        measure: the width of a text in pixels.
    """
    first, *others = phrase.split(" ")
    text, width = first, measure(first)
    for piece in (f" {word}" for word in others):
        width += measure(piece)
        if width >= CANVAS_WIDTH:
            text, width = f"{text}\n", measure(piece)
        text += piece
    return text


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
        return hashlib.sha256(f"{image.size}\0".encode() + image.tobytes()).hexdigest()


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


def rendering_identity(font: Path | None) -> str:
    """What the pixels of rendered text depend on besides the phrase."""
    name = font.name if font else "DejaVuSans.ttf"
    return f"{name} at {FONT_SIZE}, first word without a space, Pillow {PIL.__version__}"


def list_rendering_identity(font: Path | None) -> str:
    """What the pixels of a rendered list depend on besides the heading."""
    return f"{font.name if font else 'DejaVuSansMono-Bold.ttf'} at {LIST_FONT_SIZE}, Pillow {PIL.__version__}"


def _opened(source: bytes, name: str) -> Image.Image:
    if not source:
        raise InputError(f"{name}: the image file is empty")
    return _decode(lambda: Image.open(io.BytesIO(source)), name)


def _decode(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = opened()
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} allowed"
                )
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


@cache
def _font(path: Path | None, size: int, shipped: str) -> ImageFont.FreeTypeFont:
    """A font file, or where there is none one that ships with matplotlib."""
    if path is None:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / shipped
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise InputError(f"{path}: not a readable TrueType font") from error
