"""Scenarios down, kinds of picture across: an arm's rates as numbers with a shade."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.reporting.layout import percent
from mllm_protector.reporting.sentences import unjudged_text
from mllm_protector.reporting.tables import shown_groups

LEVELS = 10
"""Steps of the heat map's colour between 0 and 100 %."""

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """A rate as a number and as a shade.

    Attributes:
        text: the rate in percent.
        detail: the counts, and how many answers could not be judged.
        level: of the colour, 0 to ``LEVELS``; ``None`` if nothing was judged.
    """

    text: str
    detail: str
    level: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """One arm: scenarios down, kinds of picture across.

    Attributes:
        arm: its name.
        kinds: the columns.
        rows: (name, whether it is a group's macro mean, its cells).
    """

    arm: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, bool, Sequence[HeatCell]]]


def heat_maps(benchmark: Entry, judge: str) -> list[HeatMap]:
    """A map for each arm, as one judge sees it."""
    cells = {
        (cell["arm"], cell["scenario"], cell["variant"]): cell
        for cell in benchmark["cells"]
        if cell["judge"] == judge
    }
    means = {
        (mean["arm"], mean["group"], mean["variant"]): mean
        for mean in benchmark["means"]
        if mean["judge"] == judge
    }
    kinds = list(dict.fromkeys(kind for _, _, kind in cells))
    return [
        HeatMap(
            arm=arm,
            kinds=kinds,
            rows=[
                row
                for group, scenarios in shown_groups(benchmark["groups"]).items()
                for row in (
                    *(
                        (
                            name.replace("_", " "),
                            False,
                            [_heat_cell(cells.get((arm, name, kind))) for kind in kinds],
                        )
                        for name in scenarios
                    ),
                    (
                        f"Macro mean, {group}",
                        True,
                        [_heat_mean(means.get((arm, group, kind))) for kind in kinds],
                    ),
                )
            ],
        )
        for arm in dict.fromkeys(arm for arm, _, _ in cells)
    ]


def _heat_cell(cell: Entry | None) -> HeatCell:
    if cell is None or cell["asr"] is None:
        return HeatCell(text="-", detail=unjudged_text(cell) if cell else "", level=None)
    detail = f"{cell['harmful']:,}/{cell['judged']:,}{unjudged_text(cell)}"
    return HeatCell(text=percent(cell["asr"]), detail=detail, level=round(LEVELS * cell["asr"]))


def _heat_mean(mean: Entry | None) -> HeatCell:
    if mean is None or mean["macro"] is None:
        return HeatCell(text="-", detail="", level=None)
    return HeatCell(text=percent(mean["macro"]), detail="", level=round(LEVELS * mean["macro"]))
