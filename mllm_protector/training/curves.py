"""The course of a training as an image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_protector.drawing import COLOURS, INK, as_png, empty_figure, frame, style
from mllm_protector.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGE = "training.png"
FEW = 50
"""With up to this many points, each gets a mark."""

Rows = Sequence[Mapping[str, Any]]


def draw_training(metrics: Path, names: Sequence[str], kept: int) -> None:
    """Draw ``training.png`` beside ``metrics.jsonl``: the losses above, other metrics of validations below.

    Args:
        metrics: the path of ``metrics.jsonl``.
        names: the metrics to show.
        kept: the step whose weights were kept.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train, validation = ([row for row in rows if row["kind"] == kind] for kind in ("train", "validation"))
    others = [name for name in names if name != "loss"]
    with style():
        figure = empty_figure(6.4, 5.4)
        above, below = figure.subplots(2, sharex=True)
        _line(above, train, "loss", "training", COLOURS[0])
        _line(above, validation, "loss", "validation", INK)
        for number, name in enumerate(others, 1):
            _line(below, validation, name, name.replace("_", " "), COLOURS[number % len(COLOURS)])
        for axes, up in ((above, "loss"), (below, "validation")):
            frame(axes, up=up)
            axes.axvline(kept, color=INK, linestyle=":", label=f"kept: step {kept:,}")
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        below.set_xlabel("step")
        below.set_xlim(left=0)
        below.locator_params(axis="x", integer=True)
        write_bytes(metrics.with_name(IMAGE), as_png(figure))


def _line(axes: "Axes", rows: Rows, name: str, label: str, colour: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        mark = "." if len(points) <= FEW else ""
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1, marker=mark)
