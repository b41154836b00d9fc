"""How every plot looks: its colours, its frame, its legend; and how it becomes a file.

The same numbers give the same bytes. A name is never read as a formula, and letters are drawn as outlines, so
that a plot looks the same everywhere.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mllm_protector.reporting.tables import Row, showable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; grey first, for no guard."""

MARKERS, INK = ("o", "s", "^", "D", "v", "P"), "#333333"
WIDTH = 5.2
"""Inches, so that letters can still be read where a phone shows all of it."""


@contextmanager
def styled() -> Iterator[None]:
    """How plots look; figures are made and written within it."""
    import matplotlib

    settings = {"font.size": 8, "text.parse_math": False, "svg.hashsalt": "mllm_protector"}
    with matplotlib.rc_context({**settings, "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # drawn as an empty box
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches; pyplot, which keeps figures and wants a screen, is left alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: "Figure") -> bytes:
    """The figure as an SVG file without a date."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def add_legend(figure: "Figure", axes: "Axes", title: str) -> None:
    """The title of a figure, and below it the names of what is drawn: as many side by side as fit."""
    width, _ = figure.get_size_inches()
    handles = list(axes.get_legend_handles_labels()[0])
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(width // 2.6))),
        frameon=False,
        title="\n".join(fill(line, int(13 * width)) for line in title.split("\n")),
        title_fontproperties={"size": 10},
    )


def short_label(name: str, width: int = 40) -> str:
    """A name from outside in one short line."""
    return shorten(showable(name).replace("_", " "), width, placeholder="…") or "…"


def in_percent(rows: Sequence[Row | None]) -> NDArray[np.float64]:
    """(3, rows): values, lower and upper limits in percent, NaN where there is none."""
    shares = [[row and row[name] for row in rows] for name in ("value", "low", "high")]
    return 100 * np.array(shares, dtype=np.float64)


def add_errorbars(
    axes: "Axes", shares: NDArray[np.float64], at: Sequence[float], number: int, **look: Any
) -> None:
    """Values with their limits, side by side; ``number`` gives the marker."""
    value, low, high = shares
    reach = np.maximum(0.0, [value - low, high - value])
    axes.errorbar(value, at, xerr=reach, fmt=MARKERS[number % len(MARKERS)], capsize=2, **look)


def add_frame(axes: "Axes", across: str = "", up: str = "") -> None:
    """The names of the two axes, a grid, and no line at the top and at the right."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
