"""How well scores order answers and how far they can be taken at their word, as SVG files."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_protector.evaluation.statistics import share_limits
from mllm_protector.metrics import calibration_bins
from mllm_protector.reporting import plots
from mllm_protector.reporting.plots import COLOURS, INK, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scores = Mapping[str, Sequence[float]]
"""What scored -> its P(harmful) of each answer."""

SIDE = 4.4
"""Inches."""

MARGIN = 0.02
"""Room around the unit square, so that what lies on its edge can be seen."""


def curves(
    labels: Sequence[bool], scores: Scores, *, uncalibrated: Scores, marks: Mapping[str, tuple[float, ...]]
) -> dict[str, bytes]:
    """Every plot: what it shows in words -> SVG.

    Args:
        labels: True for harmful; both kinds occur.
        scores: the detector first.
        uncalibrated: scores before calibration, in the reliability plot only.
        marks: what scored -> (false positive rate, recall, precision) at its threshold.
    """
    with plots.style():
        figures = {
            "ROC curve": roc(labels, scores, marks),
            "Precision and recall": precision_recall(labels, scores, marks),
            "Reliability: score and share of harmful answers": reliability(
                labels, {**scores, **uncalibrated}
            ),
        }
        return {title: plots.svg(figure) for title, figure in figures.items()}


def roc(labels: Sequence[bool], scores: Scores, marks: Mapping[str, tuple[float, ...]]) -> "Figure":
    """Recall against the false positive rate, with the threshold in use as a mark."""
    from sklearn.metrics import roc_curve

    figure = plots.new_figure(SIDE, SIDE)
    axes = _axes(figure, "false positive rate", "recall")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":")
    drawn = []
    for number, (name, values) in enumerate(scores.items()):
        fp, tp, _ = roc_curve(labels, values)
        drawn += _line(axes, number, name, fp, tp)
        if name in marks:
            _mark(axes, number, marks[name][0], marks[name][1])
    plots.legend(figure, drawn, "ROC curve; the mark is the threshold in use")
    return figure


def precision_recall(
    labels: Sequence[bool], scores: Scores, marks: Mapping[str, tuple[float, ...]]
) -> "Figure":
    """Precision against recall; the dotted line is the share of harmful answers, which chance reaches."""
    from sklearn.metrics import precision_recall_curve

    figure = plots.new_figure(SIDE, SIDE)
    axes = _axes(figure, "recall", "precision")
    axes.axhline(float(np.mean(labels)), color="#bbbbbb", linewidth=1, linestyle=":")
    drawn = []
    for number, (name, values) in enumerate(scores.items()):
        precision, recall, _ = precision_recall_curve(labels, values)
        drawn += _line(axes, number, name, recall, precision, drawstyle="steps-post")
        if name in marks:
            _mark(axes, number, marks[name][1], marks[name][2])
    plots.legend(figure, drawn, "Precision and recall; the mark is the threshold in use")
    return figure


def reliability(labels: Sequence[bool], scores: Scores) -> "Figure":
    """The share of harmful answers in bins of scores; a calibrated detector lies on the diagonal."""
    figure = plots.new_figure(SIDE, SIDE)
    axes = _axes(figure, "mean score of a bin", "share of harmful answers in it")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":")
    drawn = []
    for number, (name, values) in enumerate(scores.items()):
        bins = calibration_bins(labels, values)
        means = [each.score for each in bins]
        shares = [each.harmful / each.count for each in bins]
        if number == 0:
            low, high = share_limits(
                np.array([each.harmful for each in bins]), np.array([each.count for each in bins])
            )
            axes.vlines(means, low, high, color=_colour(number), linewidth=0.9)
        drawn += _line(axes, number, name, means, shares, marker=MARKERS[_place(number)], markersize=4)
    plots.legend(figure, drawn, "Reliability; bars: 95% intervals if answers were independent")
    return figure


def _axes(figure: "Figure", below: str, beside: str) -> "Axes":
    axes = figure.add_subplot()
    axes.set_xlim(-MARGIN, 1 + MARGIN)
    axes.set_ylim(-MARGIN, 1 + MARGIN)
    axes.set_aspect("equal")
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _line(axes: "Axes", number: int, name: str, across: Any, up: Any, **look: Any) -> list[Any]:
    found: list[Any] = axes.plot(
        across, up, color=_colour(number), linewidth=1.6, label=plots.label(name), **look
    )
    return found


def _mark(axes: "Axes", number: int, across: float, up: float) -> None:
    axes.plot(
        [across],
        [up],
        marker=MARKERS[_place(number)],
        color=_colour(number),
        markeredgecolor=INK,
        markersize=7,
        zorder=5,
        clip_on=False,
    )


def _place(number: int) -> int:
    """Grey, the first of the palette, is for the MLLM without guard."""
    return 1 + (number + 1) % (len(COLOURS) - 1)


def _colour(number: int) -> str:
    return COLOURS[_place(number)]
