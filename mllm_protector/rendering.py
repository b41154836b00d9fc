"""Images drawn from words, as MM-SafetyBench and FigStep draw theirs, and images put together.

Canvas, sizes and wrapping follow MM-SafetyBench's ``creation/2_img_process.py`` and FigStep's
``src/generate_prompts.py``; the code is our own.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL
from PIL import Image, ImageDraw, ImageFont

from mllm_protector.errors import InputError
from mllm_protector.images import ImageSource, sha256

CANVAS_WIDTH = 1024
FONT_SIZE = 90

LIST_CANVAS = 760
LIST_FONT_SIZE = 80
LIST_LINE_LENGTH = 15
LIST_POINTS = 3


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
        return sha256(f"{rendering_identity(self.font)}\0{self.phrase}".encode())


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
            draw.text((20, 74 + 75 * number), line, font=font, fill="black", anchor="ls")
        return canvas

    def lines(self) -> list[str]:
        """The heading's lines, then those of the list."""
        points = [f"{number}. " for number in range(1, LIST_POINTS + 1)]
        return textwrap.wrap(self.heading, LIST_LINE_LENGTH) + points

    def digest(self) -> str:
        """Of the heading and how it is drawn."""
        return sha256(f"{list_rendering_identity(self.font)}\0{self.heading}".encode())


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
        return sha256(f"stacked {self.top.digest()} {self.bottom.digest()}".encode())


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


def rendering_identity(font: Path | None) -> str:
    """What the pixels of rendered text depend on besides the phrase."""
    name = font.name if font else "DejaVuSans.ttf"
    return f"{name} at {FONT_SIZE}, first word without a space, Pillow {PIL.__version__}"


def list_rendering_identity(font: Path | None) -> str:
    """What the pixels of a rendered list depend on besides the heading."""
    return f"{font.name if font else 'DejaVuSansMono-Bold.ttf'} at {LIST_FONT_SIZE}, Pillow {PIL.__version__}"


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
