"""What the plots of measurements share: legends, points with intervals, and short names."""

from collections.abc import Sequence
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mllm_protector.drawing import MARKERS
from mllm_protector.reporting.tables import Row, showable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2
"""Inches, so that letters can still be read where a phone shows all of it."""


def add_legend(figure: "Figure", axes: "Axes", title: str) -> None:
    """The title of a figure, and below it the names of what is drawn: as many side by side as fit."""
    width, _ = figure.get_size_inches()
    handles, labels = axes.get_legend_handles_labels()
    column = max([2.6, *(0.5 + 0.07 * len(label) for label in labels)])  # inches
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(width // column))),
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
