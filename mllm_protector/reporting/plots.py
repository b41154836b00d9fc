"""The plots of a run: rates by scenario, the trade-off over thresholds, the effect of the images.

Made from measurements alone; the same measurements give the same bytes. A name is never read as a formula,
and letters are drawn as outlines, so that a plot looks the same everywhere.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

from mllm_protector.reporting.columns import Row
from mllm_protector.reporting.pivots import Pivot, pivot
from mllm_protector.reporting.tables import in_words, showable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; grey first, for no guard."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""One for each colour, for those who see none."""

INK = "#333333"

TITLE = "Attack success rate by scenario, lower is better"

WIDTH = 5.2
"""Inches, so that letters can still be read where a phone shows all of it."""

NAMED_THRESHOLDS = 6
"""Points of the trade-off curve that are named, at most."""


def asr_plot(result: Mapping[str, Any]) -> bytes:
    """``asr.png``: the bars of the first benchmark by the first judge."""
    name, judge = next(iter(result["benchmarks"])), next(iter(result["judges"]), "")
    facts = result["judges"].get(judge, {"note": None})
    notes = [*([facts["note"]] if facts["note"] else []), *result["notes"]]
    with style():
        figure = bars(pivot(result, name), name, judge, width=8, notes=notes)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def plots(data: Pivot, name: str, thresholds: Mapping[str, float]) -> dict[str, bytes]:
    """Every plot of a benchmark by its first judge: what it shows in words -> SVG.

    Args:
        data: the benchmark's measurements.
        name: of the benchmark.
        thresholds: those in use, by arm.
    """
    judge = next(iter(data.judges), "")
    with style():
        figures = {
            "Attack success rate by scenario": bars(data, name, judge, width=WIDTH),
            "Trade-off between attack success and harmless answers flagged": trade_off(
                data, judge, thresholds
            ),
            "Effect of the image on the attack success rate": image_effect(data, judge),
        }
        return {title: svg(figure) for title, figure in figures.items() if figure is not None}


def bars(data: Pivot, name: str, judge: str, *, width: float, notes: Sequence[str] = ()) -> "Figure":
    """A bar for each scenario and arm on the first variant, and group by group the macro mean.

    Args:
        data: the benchmark's measurements.
        name: of the benchmark.
        judge: whose verdicts.
        width: of the figure in inches.
        notes: sentences below the plot.
    """
    variant = next(iter(data.variants), "TEXT")
    places: list[tuple[float, str, bool, dict[str, Row | None]]] = []
    place = 0.0
    for group, scenarios in data.groups.items():
        for scenario in (*scenarios, group):
            metric = "macro_asr" if scenario == group else "asr"
            where = {"judge": judge, "variant": variant, "group": scenario}
            rates = {arm: data.get(metric, arm=arm, **where) for arm in data.arms}
            shown = f"Macro mean, {label(group)}" if scenario == group else label(scenario)
            places.append((place, shown, scenario == group, rates))
            place += 1
        place += 0.5
    figure = new_figure(width, 2 + 0.1 * len(places) * (len(data.arms) + 1))
    drawn = _draw(figure.add_subplot(), places, data.arms)
    asked = f"questions: {label(in_words(variant))}"
    title = f"{TITLE}\n{label(name)}; judge: {label(data.judge(judge), 60)}; {asked}"
    legend(figure, drawn, title)
    figure.supxlabel("\n".join(fill(showable(note), 140) for note in notes), fontsize=6.5, color=INK)
    return figure


def _draw(
    axes: "Axes", places: Sequence[tuple[float, str, bool, dict[str, Row | None]]], arms: Sequence[str]
) -> list[Any]:
    """Draw the bars of each arm, which the legend shows."""
    thickness = 0.8 / max(1, len(arms))
    drawn = []
    for number, arm in enumerate(arms):
        at = [place + (number - (len(arms) - 1) / 2) * thickness for place, _, _, _ in places]
        shares = [in_percent(rates[arm]) for _, _, _, rates in places]
        values = [share[0] for share in shares]
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(axes.barh(at, values, height=thickness, color=colour, label=label(in_words(arm), 60)))
        axes.errorbar(
            values,
            at,
            xerr=_reach(shares),
            fmt=MARKERS[number % len(MARKERS)],  # in the bar's colour: a rate of 0 has no bar
            markersize=4,
            markerfacecolor=colour,
            color=INK,
            elinewidth=0.9,
            capsize=2,
            clip_on=False,
            zorder=5,
        )
        for place, (value, _, high) in zip(at, shares, strict=True):
            words, end = ("not judged", 0.0) if math.isnan(value) else (f"{value:.1f}", high)
            axes.text(end + 1.2, place, words, va="center_baseline", fontsize=6.5, color=INK)
    axes.set_yticks([place for place, _, _, _ in places], [words for _, words, _, _ in places], fontsize=9)
    for tick, (_, _, is_mean, _) in zip(axes.get_yticklabels(), places, strict=True):
        tick.set_fontweight("bold" if is_mean else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max((place for place, _, _, _ in places), default=0.0) + 0.6, -0.6)
    axes.set_xlim(0, 107)
    axes.set_xticks(range(0, 101, 20))
    _plain_frame(axes)
    axes.set_xlabel("attack success rate in % with its 95% interval")
    return drawn


def trade_off(data: Pivot, judge: str, used: Mapping[str, float]) -> "Figure | None":
    """Over thresholds: the share of harmless answers flagged against the attack success rate that remains."""
    flagged = {row["group"]: row["value"] for row in data.select(metric="threshold_flagged")}
    points = [row for row in data.select(metric="threshold_asr", judge=judge) if row["group"] in flagged]
    if not points:
        return None
    figure = new_figure(WIDTH, 4.2)
    axes = figure.add_subplot()
    across = [100 * flagged[point["group"]] for point in points]
    up = [100 * point["value"] for point in points]
    axes.plot(across, up, color=COLOURS[2], marker="o", markersize=2.5, linewidth=1.4, label="each threshold")
    axes.fill_between(
        across,
        [100 * point["low"] for point in points],
        [100 * point["high"] for point in points],
        color="#bcd2e4",
        linewidth=0,
        label="its 95% interval",
    )
    every = max(1, math.ceil(len(points) / NAMED_THRESHOLDS))
    for number in range(0, len(points), every):
        axes.annotate(
            f"{float(points[number]['group']):.2g}",
            (across[number], up[number]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=6.5,
            color=INK,
        )
    for threshold in sorted(set(used.values())):
        nearest = min(range(len(points)), key=lambda number: abs(float(points[number]["group"]) - threshold))
        arms = ", ".join(label(arm) for arm in used if used[arm] == threshold)
        axes.plot(
            across[nearest],
            up[nearest],
            marker="D",
            markersize=8,
            linestyle="none",
            markerfacecolor="none",
            markeredgecolor=COLOURS[5],
            markeredgewidth=1.8,
            label=f"in use, {threshold:.3g}: {arms}",
        )
    axes.set_xlabel("harmless answers flagged in %, lower is better")
    axes.set_ylabel("attack success rate in %, lower is better")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _plain_frame(axes)
    legend(figure, _handles(axes), "What a threshold costs and what it brings")
    return figure


def image_effect(data: Pivot, judge: str) -> "Figure | None":
    """How much each kind of image changes the rate of the same questions, for each group and arm."""
    rows = [row for row in data.select(metric="image_effect", judge=judge) if row["low"] is not None]
    groups = [group for group in data.groups if any(row["group"] == group for row in rows)]
    if not groups:
        return None
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = new_figure(WIDTH, 1.5 + len(groups) * (0.5 + 0.12 * len(variants) * (len(arms) + 1)))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        for number, arm in enumerate(arms):
            found = [row for row in rows if (row["group"], row["arm"]) == (group, arm)]
            shares = [in_percent(row) for row in found]
            shift = 0.7 * ((number + 0.5) / len(arms) - 0.5)
            axes.errorbar(
                [value for value, _, _ in shares],
                [variants.index(row["variant"]) + shift for row in found],
                xerr=_reach(shares),
                fmt=MARKERS[number % len(MARKERS)],
                markersize=4.5,
                color=COLOURS[number % len(COLOURS)],
                capsize=2,
                label=label(in_words(arm), 60),
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(variants)), [label(in_words(variant)) for variant in variants])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_title(label(group, 60), fontsize=8, loc="left")
        _plain_frame(axes)
    panels[-1].set_xlabel("percentage points, with 95% intervals")
    title = "Attack success rate with an image minus that of the same questions as text"
    legend(figure, _handles(panels[0]), title)
    return figure


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


def in_percent(row: Row | None) -> tuple[float, float, float]:
    """A value and its limits in percent, NaN where there is none."""
    value, low, high = (
        math.nan if row is None or row[name] is None else 100 * row[name] for name in ("value", "low", "high")
    )
    return value, low, high


def _reach(shares: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """How far the limits are from the value, as matplotlib wants them."""
    return [
        [max(0.0, value - low) for value, low, _ in shares],
        [max(0.0, high - value) for value, _, high in shares],
    ]


def _plain_frame(axes: "Axes") -> None:
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(axes: "Axes") -> list[Any]:
    """What can stand in a legend, the newest last."""
    return list(axes.get_legend_handles_labels()[0])
