"""The attack success rate by scenario as bars, and what all plots have in common.

Plots are made from the content of ``asr.json`` alone, and the same content gives the same bytes. A name is
never read as a formula, and letters are drawn as outlines, so that a plot looks the same everywhere.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from mllm_protector.evaluation.statistics import proportion
from mllm_protector.reporting.layout import in_words, showable
from mllm_protector.reporting.tables import shown_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; grey first, for the bare MLLM."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""One for each colour, for those who see none."""

INK = "#333333"

TITLE = "Attack success rate by scenario, lower is better"


class Share(NamedTuple):
    """A rate and its 95 % limits, in percent; NaN if nothing was judged."""

    rate: float
    low: float
    high: float


class _Row(NamedTuple):
    """The bars of a scenario, or of a group's macro mean: one for each arm."""

    place: float
    label: str
    is_mean: bool
    shares: dict[str, Share]


def chart(result: Mapping[str, Any]) -> bytes:
    """``asr.png``: the bars of the first benchmark by the first judge."""
    benchmark = next(iter(result["benchmarks"]), "")
    judge = next(iter(result["judges"]), "")
    facts = result["judges"].get(judge, {"note": None})
    notes = [*([facts["note"]] if facts["note"] else []), *result["notes"]]
    with style():
        figure = bars(result, benchmark, judge, width=8, notes=notes)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """How plots look; figures are made and written within it."""
    import matplotlib

    settings = {
        "font.size": 8,
        "text.parse_math": False,  # "$" starts no formula
        "svg.hashsalt": "mllm_protector",
        "svg.fonttype": "path",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # drawn as an empty box
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches; pyplot, which keeps figures and wants a screen, is left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: "Figure") -> bytes:
    """The figure as an SVG file without a date."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def legend(figure: "Figure", handles: Sequence[Any], title: str) -> None:
    """The title of a figure, and below it the names of what is drawn: as many side by side as fit."""
    width, _ = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(width // 2.6))),
        frameon=False,
        title="\n".join(fill(line, int(13 * width)) for line in title.split("\n")),
        title_fontproperties={"size": 10},
    )


def label(name: str, width: int = 40) -> str:
    """A name from outside as a plot can hold it: in one short line."""
    return shorten(showable(name).replace("_", " "), width, placeholder="…") or "…"


def in_percent(*limits: float | None) -> Share:
    """A rate and its limits, ``None`` as NaN."""
    return Share(*(math.nan if limit is None else 100 * limit for limit in limits))


def pooled(cells: Sequence[Mapping[str, Any]]) -> Share:
    """The rate of all answers in some cells.

    Wilson's interval, in which the pictures of one question count as one answer: they are not independent,
    and how much they depend on each other cannot be seen in counts.
    """
    judged = sum(cell["judged"] for cell in cells)
    independent = max((cell["judged"] for cell in cells), default=0)
    share = proportion(sum(cell["harmful"] for cell in cells), judged, independent)
    return in_percent(share.value, share.low, share.high)


def headline_cells(benchmark: Mapping[str, Any], judge: str) -> tuple[list[Mapping[str, Any]], str]:
    """A judge's cells of the questions with pictures (with text only, if there are no pictures).

    Returns:
        The cells, and in words how their questions were asked.
    """
    cells = [cell for cell in benchmark["cells"] if cell["judge"] == judge]
    pictures = list(dict.fromkeys(cell["variant"] for cell in cells if cell["variant"] != "TEXT"))
    asked = f"with a picture ({' + '.join(pictures)})" if pictures else "without a picture (TEXT)"
    return [cell for cell in cells if cell["variant"] in (pictures or ["TEXT"])], asked


def arms_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms of cells or means, in their order."""
    return list(dict.fromkeys(entry["arm"] for entry in entries))


def bars(
    result: Mapping[str, Any], name: str, judge: str, *, width: float, notes: Sequence[str] = ()
) -> "Figure":
    """A bar for each scenario and arm: all pictures pooled, or the text where there are none.

    Args:
        result: the content of ``asr.json``.
        name: of the benchmark.
        judge: whose verdicts.
        width: of the figure in inches.
        notes: sentences below the plot.
    """
    benchmark = result["benchmarks"].get(name, {"cells": [], "means": [], "groups": {}})
    cells, asked = headline_cells(benchmark, judge)
    means = [mean for mean in benchmark["means"] if mean["judge"] == judge]
    means = [mean for mean in means if mean["variant"] == means[0]["variant"]]
    rows = _rows(benchmark["groups"], means, cells)
    arms = arms_of(cells)
    circular = judge in result["judges"] and result["judges"][judge]["circular"]
    mark = " (circular)" if circular else ""

    figure = new_figure(width, 2 + 0.1 * len(rows) * (len(arms) + 1))
    drawn = _draw(figure.add_subplot(), rows, arms)
    title = f"{TITLE}\n{label(name)}; judge: {label(judge)}{mark}; questions {asked}"
    legend(figure, drawn, title)
    figure.supxlabel("\n".join(fill(showable(note), 140) for note in notes), fontsize=6.5, color=INK)
    return figure


def _rows(
    groups: Mapping[str, Sequence[str]],
    means: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
) -> list[_Row]:
    """Group by group from the top, each with its macro mean below its scenarios."""
    rows: list[_Row] = []
    place = 0.0
    for group, scenarios in shown_groups(groups).items():
        of_arm = {mean["arm"]: mean for mean in means if mean["group"] == group}
        for scenario in scenarios:
            shares = {
                arm: pooled([cell for cell in cells if (cell["scenario"], cell["arm"]) == (scenario, arm)])
                for arm in of_arm
            }
            rows.append(_Row(place, label(scenario), False, shares))
            place += 1
        shares = {
            arm: in_percent(mean["macro"], mean["macro_low"], mean["macro_high"])
            for arm, mean in of_arm.items()
        }
        rows.append(_Row(place, f"Macro mean, {label(group)}", True, shares))
        place += 1.5
    return rows


def _draw(axes: "Axes", rows: Sequence[_Row], arms: Sequence[str]) -> list[Any]:
    """Draw everything inside the axes.

    Returns:
        What the legend shows: the bars of each arm.
    """
    thickness = 0.8 / max(1, len(arms))
    drawn = []
    for number, arm in enumerate(arms):
        places = [row.place + (number - (len(arms) - 1) / 2) * thickness for row in rows]
        shares = [row.shares[arm] for row in rows]
        rates = [share.rate for share in shares]
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(axes.barh(places, rates, height=thickness, color=colour, label=label(in_words(arm), 60)))
        axes.errorbar(
            rates,
            places,
            xerr=[
                [share.rate - share.low for share in shares],
                [share.high - share.rate for share in shares],
            ],
            fmt=MARKERS[number % len(MARKERS)],  # in the bar's colour: a rate of 0 has no bar
            markersize=4,
            markerfacecolor=colour,
            color=INK,
            elinewidth=0.9,
            capsize=2,
            clip_on=False,
            zorder=5,
        )
        for place, share in zip(places, shares, strict=True):
            words, end = ("not judged", 0.0) if math.isnan(share.rate) else (f"{share.rate:.1f}", share.high)
            axes.text(end + 1.2, place, words, va="center_baseline", fontsize=6.5, color=INK)
    axes.set_yticks([row.place for row in rows], [row.label for row in rows], fontsize=9)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.is_mean else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max((row.place for row in rows), default=0.0) + 0.6, -0.6)
    axes.set_xlim(0, 107)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("attack success rate in % with its 95% interval")
    return drawn
