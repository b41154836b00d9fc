"""The plots of the page beside the bars, as SVG files: radar, trade-off, effect of the pictures.

Each is ``None`` where there is nothing to draw. Made from the content of ``asr.json`` alone.
"""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mllm_protector.reporting import chart
from mllm_protector.reporting.chart import COLOURS, INK, MARKERS, label
from mllm_protector.reporting.layout import in_words
from mllm_protector.reporting.tables import shown_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2
"""Inches, so that letters can still be read where a phone shows all of it."""

FEWEST_SPOKES = 3
"""A radar of fewer scenarios is a line."""

NAMED_THRESHOLDS = 6
"""So many points of the trade-off curve are named at most."""


def pictures_of(result: Mapping[str, Any], name: str, judge: str) -> dict[str, bytes]:
    """Every plot of a benchmark by a judge: what it shows in words -> SVG."""
    benchmark = result["benchmarks"][name]
    with chart.style():
        figures = {
            "Attack success rate by scenario, as bars": chart.bars(result, name, judge, width=WIDTH),
            "Attack success rate by scenario, as a radar": radar(benchmark, judge),
            "Trade-off between attack success and harmless answers flagged": trade_off(
                benchmark, judge, result["guard"]
            ),
            "Effect of the picture on the attack success rate": picture_effect(benchmark, judge),
        }
        return {title: chart.svg(figure) for title, figure in figures.items() if figure is not None}


def radar(benchmark: Mapping[str, Any], judge: str) -> "Figure | None":
    """A spoke for each scenario and a line for each arm, all pictures pooled; the rim is 100 %."""
    cells, asked = chart.headline_cells(benchmark, judge)
    scenarios = [name for names in shown_groups(benchmark["groups"]).values() for name in names]
    if len(scenarios) < FEWEST_SPOKES or not cells:
        return None
    angles = [2 * math.pi * number / len(scenarios) for number in range(len(scenarios))]
    figure = chart.new_figure(WIDTH, WIDTH)
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    for number, arm in enumerate(chart.arms_of(cells)):
        rates = [
            chart.pooled([cell for cell in cells if (cell["scenario"], cell["arm"]) == (scenario, arm)]).rate
            for scenario in scenarios
        ]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            [*angles, angles[0]],
            [*rates, rates[0]],
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            clip_on=False,
            label=label(in_words(arm), 60),
        )
        axes.fill(angles, [0 if math.isnan(rate) else rate for rate in rates], color=colour, alpha=0.12)
    axes.set_xticks(angles, [fill(label(name, 30), 13) for name in scenarios], fontsize=7)
    for tick, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        tick.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.set_ylim(0, 100)
    axes.set_yticks(range(20, 101, 20), [f"{share} %" for share in range(20, 101, 20)], fontsize=6.5)
    axes.set_rlabel_position(180 / len(scenarios))
    axes.grid(color="#dddddd")
    axes.spines["polar"].set_color("#bbbbbb")
    chart.legend(figure, _handles(axes), f"Attack success rate, lower is better; questions {asked}")
    return figure


def trade_off(
    benchmark: Mapping[str, Any], judge: str, guard: Mapping[str, Mapping[str, Any]]
) -> "Figure | None":
    """Over thresholds: the share of harmless answers flagged against the attack success rate that remains."""
    points = [
        point
        for point in benchmark["tradeoff"].get(judge) or []
        if point["asr"] is not None and point["flagged"] is not None
    ]
    if not points:
        return None
    figure = chart.new_figure(WIDTH, 4.2)
    axes = figure.add_subplot()
    across = [100 * point["flagged"] for point in points]
    up = [100 * point["asr"] for point in points]
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
            f"{points[number]['threshold']:.2g}",
            (across[number], up[number]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=6.5,
            color=INK,
        )
    used = {arm: facts["threshold"] for arm, facts in guard.items()}
    for threshold in sorted(set(used.values())):
        nearest = min(range(len(points)), key=lambda number: abs(points[number]["threshold"] - threshold))
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
    chart.legend(figure, _handles(axes), "What a threshold costs and what it brings")
    return figure


def picture_effect(benchmark: Mapping[str, Any], judge: str) -> "Figure | None":
    """How much each kind of picture changes the rate of the same questions, for each group and arm."""
    entries = [
        entry
        for entry in benchmark["images"]
        if entry["judge"] == judge and entry["difference"] is not None and entry["low"] is not None
    ]
    groups = [
        group
        for group in shown_groups(benchmark["groups"])
        if any(entry["group"] == group for entry in entries)
    ]
    if not groups:
        return None
    variants = list(dict.fromkeys(entry["variant"] for entry in entries))
    arms = chart.arms_of(entries)
    figure = chart.new_figure(WIDTH, 1.5 + len(groups) * (0.5 + 0.12 * len(variants) * (len(arms) + 1)))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        for number, arm in enumerate(arms):
            found = [entry for entry in entries if (entry["group"], entry["arm"]) == (group, arm)]
            shift = 0.7 * ((number + 0.5) / len(arms) - 0.5)
            axes.errorbar(
                [100 * entry["difference"] for entry in found],
                [variants.index(entry["variant"]) + shift for entry in found],
                xerr=_reach(found, "difference", "low", "high"),
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
    chart.legend(
        figure,
        _handles(panels[0]),
        "Attack success rate with a picture minus that of the same questions as text",
    )
    return figure


def _reach(entries: Sequence[Mapping[str, Any]], middle: str, low: str, high: str) -> list[list[float]]:
    """How far the limits are from the value, in percent, as matplotlib wants them."""
    return [
        [max(0.0, 100 * (entry[middle] - entry[low])) for entry in entries],
        [max(0.0, 100 * (entry[high] - entry[middle])) for entry in entries],
    ]


def _plain_frame(axes: "Axes") -> None:
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(axes: "Axes") -> list[Any]:
    """What can stand in a legend, the newest last."""
    return list(axes.get_legend_handles_labels()[0])
