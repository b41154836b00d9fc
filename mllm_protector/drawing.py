"""How the plots look.

The same numbers give the same bytes. A text is never read as a formula, and letters are drawn as outlines, so
that a plot looks the same everywhere.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; grey first, for no guard."""

MARKERS, INK = ("o", "s", "^", "D", "v", "P"), "#333333"


@contextmanager
def style() -> Iterator[None]:
    """How plots look; figures are made and written within it."""
    import matplotlib

    settings = {"font.size": 8, "text.parse_math": False, "svg.hashsalt": "mllm_protector"}
    with matplotlib.rc_context({**settings, "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # drawn as an empty box
        yield


def empty_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches; pyplot, which keeps figures and wants a screen, is left alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def frame(axes: "Axes", across: str = "", up: str = "") -> None:
    """Name the axes, and draw the grid."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def as_svg(figure: "Figure") -> bytes:
    """The figure as an SVG file without a date."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def as_png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
