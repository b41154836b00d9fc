"""Plots: rates by scenario, the trade-off over thresholds, the effect of images, and a detector's curves."""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_protector.drawing import COLOURS, INK, MARKERS, as_png, as_svg, empty_figure, frame, style
from mllm_protector.evaluation.statistics import share_limits
from mllm_protector.metrics import calibration_bins
from mllm_protector.reporting.drawing import WIDTH, add_errorbars, add_legend, in_percent, short_label
from mllm_protector.reporting.pivots import Pivot, pivot
from mllm_protector.reporting.tables import Row, in_words, showable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Mapping[str, Sequence[float]]  # the scorer -> its P(harmful) of each answer
Marks = Mapping[str, tuple[float, ...]]  # -> (false positive rate, recall, precision) at its threshold


def asr_plot(result: Mapping[str, Any]) -> bytes:
    """``asr.png``: the bars of the first benchmark by the first judge."""
    name, judge = next(iter(result["benchmarks"])), next(iter(result["judges"]), "")
    note = result["judges"][judge]["note"] if judge else None
    with style():
        figure = _bars(pivot(result, name), name, judge, 8, [*([note] if note else []), *result["notes"]])
        return as_png(figure)


def plots(data: Pivot, name: str, thresholds: Mapping[str, float]) -> dict[str, bytes]:
    """Every plot of a benchmark by its first judge: title -> SVG; ``thresholds`` are those of the arms."""
    judge = next(iter(data.judges), "")
    with style():
        figures = {
            "Attack success rate by scenario": _bars(data, name, judge, WIDTH),
            "Attack success and harmless answers flagged": _trade_off(data, judge, thresholds),
            "Effect of the image on the attack success rate": _image_effect(data, judge),
        }
        return {title: as_svg(figure) for title, figure in figures.items() if figure is not None}


def curves(labels: Sequence[bool], scores: Scores, *, uncalibrated: Scores, marks: Marks) -> dict[str, bytes]:
    """How well scores order answers, and how well calibrated they are: the plot's title -> SVG.

    ``scores`` has the detector first; ``uncalibrated`` ones are in the reliability plot only.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    roc = {name: roc_curve(labels, values)[:2] for name, values in scores.items()}
    recalls = {name: precision_recall_curve(labels, values)[1::-1] for name, values in scores.items()}
    rates = {name: mark[:2] for name, mark in marks.items()}
    points = {name: mark[1:] for name, mark in marks.items()}
    chance = [float(np.mean(labels))] * 2
    steps = {"drawstyle": "steps-post"}
    with style():
        figures = {
            "ROC curve": _square("false positive rate", "recall", [0, 1], roc, rates),
            "Precision and recall": _square("recall", "precision", chance, recalls, points, **steps),
            "Reliability": _reliability(labels, {**scores, **uncalibrated}),
        }
        return {title: as_svg(figure) for title, figure in figures.items()}


def points(
    series: Mapping[str, Mapping[str, Row]],
    across: str,
    title: str,
    others: Mapping[str, Mapping[str, float]] | None = None,
) -> bytes:
    """A line for each name, with a point and its interval of each series, as SVG; ``others`` are ticks."""
    names = list(next(iter(series.values())))
    with style():
        figure = empty_figure(WIDTH, 1.6 + (0.32 + 0.1 * len(series)) * len(names))
        axes = figure.add_subplot()
        if others is not None:
            known = [(n, value) for n, name in enumerate(names) for value in others.get(name, {}).values()]
            look: dict[str, Any] = {"color": COLOURS[0], "markersize": 12, "label": "published guards"}
            axes.plot([100 * value for _, value in known], [place for place, _ in known], "|", **look)
        for number, (label, rows) in enumerate(series.items()):
            shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
            look = {"color": COLOURS[(2 + number) % len(COLOURS)], "label": label, "markersize": 4.5}
            at = [names.index(name) + shift for name in rows]
            add_errorbars(axes, in_percent([*rows.values()]), at, number, **look)
        axes.set_yticks(range(len(names)), [short_label(name) for name in names])
        axes.invert_yaxis()
        frame(axes, across)
        add_legend(figure, axes, title)
        return as_svg(figure)


def _bars(data: Pivot, name: str, judge: str, width: float, notes: Sequence[str] = ()) -> "Figure":
    """A bar for each scenario and arm on the first variant, and for each group its macro mean."""
    variant = next(iter(data.variants), "TEXT")
    lines: list[tuple[float, str, str]] = []  # place, metric, scenario or group
    for number, (group, scenarios) in enumerate(data.groups.items()):
        for metric, each in [*(("asr", scenario) for scenario in scenarios), ("macro_asr", group)]:
            lines.append((len(lines) + number / 2, metric, each))
    figure = empty_figure(width, 2 + 0.1 * len(lines) * (len(data.arms) + 1))
    axes = figure.add_subplot()
    thickness = 0.8 / max(1, len(data.arms))
    for number, arm in enumerate(data.arms):
        shift = (number - (len(data.arms) - 1) / 2) * thickness
        at = [place + shift for place, _, _ in lines]
        where = {"judge": judge, "variant": variant, "arm": arm}
        shares = in_percent([data.get(metric, group=each, **where) for _, metric, each in lines])
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(at, shares[0], height=thickness, color=colour, label=short_label(in_words(arm), 60))
        # The marker has the bar's colour: a rate of 0 has no bar.
        look = {"markersize": 4, "markerfacecolor": colour, "color": INK, "elinewidth": 0.9, "zorder": 5}
        add_errorbars(axes, shares, at, number, clip_on=False, **look)
        for place, value, high in zip(at, shares[0], shares[2], strict=True):
            words, end = ("not judged", 0.0) if math.isnan(value) else (f"{value:.1f}", high)
            axes.text(end + 1.2, place, words, va="center_baseline", fontsize=6.5, color=INK)
    before = {"asr": "", "macro_asr": "Macro mean, "}
    names = [before[metric] + short_label(each) for _, metric, each in lines]
    axes.set_yticks([place for place, _, _ in lines], names, fontsize=9)
    for tick, (_, metric, _) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if metric == "macro_asr" else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max((place for place, _, _ in lines), default=0.0) + 0.6, -0.6)
    axes.set_xlim(0, 107)
    axes.set_xticks(range(0, 101, 20))
    frame(axes, "attack success rate in % with its 95% interval")
    shown = f"{short_label(name)}; judge: {short_label(data.judge(judge), 60)}"
    asked = f"questions: {short_label(in_words(variant))}"
    add_legend(figure, axes, f"Attack success rate by scenario, lower is better\n{shown}; {asked}")
    figure.supxlabel("\n".join(fill(showable(note), 140) for note in notes), fontsize=6.5, color=INK)
    return figure


def _trade_off(data: Pivot, judge: str, used: Mapping[str, float]) -> "Figure | None":
    """Over thresholds: the share of harmless answers flagged against the attack success rate that remains."""
    flagged = {row["group"]: row["value"] for row in data.select(metric="threshold_flagged")}
    points = [row for row in data.select(metric="threshold_asr", judge=judge) if row["group"] in flagged]
    if not points:
        return None
    figure = empty_figure(WIDTH, 4.2)
    axes = figure.add_subplot()
    thresholds = np.array([float(point["group"]) for point in points])
    across = [100 * flagged[point["group"]] for point in points]
    up, low, high = in_percent(points)
    axes.plot(across, up, color=COLOURS[2], marker="o", markersize=2.5, linewidth=1.4, label="each threshold")
    axes.fill_between(across, low, high, color="#bcd2e4", linewidth=0, label="its 95% interval")
    for number in range(0, len(points), math.ceil(len(points) / 6)):
        look: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 6.5}
        axes.annotate(f"{thresholds[number]:.2g}", (across[number], up[number]), color=INK, **look)
    for threshold in sorted(set(used.values())):
        nearest = int(np.abs(thresholds - threshold).argmin())
        arms = ", ".join(short_label(arm) for arm in used if used[arm] == threshold)
        look = {"markersize": 8, "markerfacecolor": "none", "markeredgecolor": COLOURS[5]}
        look |= {"markeredgewidth": 1.8, "label": f"in use, {threshold:.3g}: {arms}"}
        axes.plot(across[nearest], up[nearest], marker="D", linestyle="none", **look)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    lower = "in %, lower is better"
    frame(axes, f"harmless answers flagged {lower}", f"attack success rate {lower}")
    add_legend(figure, axes, "Costs and benefits of a threshold")
    return figure


def _image_effect(data: Pivot, judge: str) -> "Figure | None":
    """How much each kind of image changes the rate of the same questions, for each group and arm."""
    rows = [row for row in data.select(metric="image_effect", judge=judge) if row["low"] is not None]
    groups = [group for group in data.groups if any(row["group"] == group for row in rows)]
    if not groups:
        return None
    variants, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "arm"))
    figure = empty_figure(WIDTH, 1.5 + len(groups) * (0.5 + 0.12 * len(variants) * (len(arms) + 1)))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        for number, arm in enumerate(arms):
            found = [row for row in rows if (row["group"], row["arm"]) == (group, arm)]
            shift = 0.7 * ((number + 0.5) / len(arms) - 0.5)
            at = [variants.index(row["variant"]) + shift for row in found]
            look = {"color": COLOURS[number % len(COLOURS)], "label": short_label(in_words(arm), 60)}
            add_errorbars(axes, in_percent(found), at, number, markersize=4.5, **look)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(variants)), [short_label(in_words(variant)) for variant in variants])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_title(short_label(group, 60), fontsize=8, loc="left")
        frame(axes)
    panels[-1].set_xlabel("percentage points, with 95% intervals")
    title = "Attack success rate with an image minus that of the same questions as text"
    add_legend(figure, panels[0], title)
    return figure


def _square(
    across: str, up: str, reference: Sequence[float], lines: Mapping[str, Any], marks: Marks, **look: Any
) -> "Figure":
    """Lines in the unit square, with a dotted reference and the thresholds in use as marks."""
    figure = empty_figure(4.4, 4.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], reference, color="#bbbbbb", linewidth=1, linestyle=":")
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        place = 1 + (number + 1) % (len(COLOURS) - 1)  # grey is for the MLLM without guard
        colour: dict[str, Any] = {"color": COLOURS[place]}
        axes.plot(xs, ys, linewidth=1.6, label=short_label(name), **colour, **look)
        if name in marks:
            shape: dict[str, Any] = {"marker": MARKERS[place], "markeredgecolor": INK, "markersize": 7}
            axes.plot(*([each] for each in marks[name]), zorder=5, clip_on=False, **colour, **shape)
    axes.set_xlim(-0.02, 1.02)  # a line on the edge can be seen
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    frame(axes, across, up)
    title = "the mark is the threshold in use" if marks else "bars: 95% intervals if answers were independent"
    add_legend(figure, axes, title)
    return figure


def _reliability(labels: Sequence[bool], scores: Scores) -> "Figure":
    """The share of harmful answers in bins of scores; a calibrated detector lies on the diagonal."""
    bins = {name: calibration_bins(labels, values) for name, values in scores.items()}
    lines = {
        name: ([each.score for each in found], [each.harmful / each.count for each in found])
        for name, found in bins.items()
    }
    sides = ("mean score of a bin", "share of harmful answers in it")
    figure = _square(*sides, [0, 1], lines, {}, marker="o", markersize=4)
    first = next(iter(bins))
    counts = np.array([(each.harmful, each.count) for each in bins[first]])
    low, high = share_limits(counts[:, 0], counts[:, 1])
    figure.axes[0].vlines(lines[first][0], low, high, color=COLOURS[2], linewidth=0.9)
    return figure
