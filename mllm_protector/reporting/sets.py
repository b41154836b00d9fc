"""A detector on several sets: one table, and one plot, beside what other guards are published to reach."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from mllm_protector.evaluation.detection import DETECTOR
from mllm_protector.evaluation.detector import MeasuredDetector
from mllm_protector.evaluation.measurements import as_csv
from mllm_protector.files import write_text
from mllm_protector.reporting.page import render
from mllm_protector.reporting.plots import points
from mllm_protector.reporting.tables import Row, Table, decimal, latex, publish, share, upright

log = logging.getLogger(__name__)

TITLE = "A harm detector on several sets"

COLUMNS = {
    "F1": ("f1", DETECTOR, share),
    "precision": ("precision", DETECTOR, share),
    "recall": ("recall", DETECTOR, share),
    "false positive rate": ("false_positive_rate", DETECTOR, share),
    "AUROC": ("auroc", DETECTOR, decimal),
    "average precision": ("average_precision", DETECTOR, decimal),
    "ECE": ("ece", DETECTOR, decimal),
    "F1, baseline": ("f1", "baseline", share),
    "AUROC, baseline": ("auroc", "baseline", decimal),
    "AUROC, in-domain baseline": ("auroc", "in_domain_baseline", decimal),
}
"""Header -> metric, arm, and how it is written."""

HOW = (
    "F1, precision, recall and false positive rate in %, at the detector's own threshold and at 0.5 for the "
    "baselines. In brackets: the 95 % interval, in which all answers to one query count as one draw."
)


@cache
def published() -> tuple[dict[str, str], ...]:
    """The published figures of other guards, as texts.

    Fields: set, answers (on how many, if that is known), model, metric, value (a share), comparison, source.
    """
    path = Path(__file__).with_name("published_figures.csv")
    return tuple(pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"))  # type: ignore[arg-type]


def report_sets(measured: Sequence[MeasuredDetector]) -> None:
    """Write ``sets`` as Markdown, LaTeX, HTML and SVG, and ``measurements.csv``; print the tables."""
    folder = measured[0].folder.parent
    metrics = {each.metrics["set"]: upright(each.metrics) for each in measured}
    rows = [row for each in metrics.values() for row in each["measurements"]]
    first = next(iter(metrics.values()))
    lines = [
        f"Detector {first['detector']['folder']}; threshold {first['threshold']:.4g} "
        f"({first['threshold_how']}).",
        HOW,
        *(
            f"Note on {name}: published figures are on another number of answers, so none are shown."
            for name in metrics
            if any(each["set"] == name for each in published())
            and not (_figures(metrics, "f1") | _figures(metrics, "accuracy")).get(name)
        ),
        *dict.fromkeys(f"Note on {name}: {note}" for name, each in metrics.items() for note in each["notes"]),
    ]
    tables = [_sets(metrics), *_published(metrics)]
    plot = points(
        {"this detector": _values(metrics, "f1")},
        "F1 in %, with 95% intervals",
        "F1 at the detector's own threshold",
        _figures(metrics, "f1"),
    )
    write_text(folder / "sets.tex", latex(lines, tables))
    write_text(folder / "measurements.csv", as_csv(rows))
    page = render(
        "detector.html.j2",
        title=TITLE,
        folder=first["detector"]["folder"],
        headline=lines[0],
        remarks=lines[1:2],
        notes=lines[2:],
        plots={"F1 by set": plot},
        tables=tables,
        facts="\n".join(f"{name}: {each['data']['account']}" for name, each in metrics.items()),
    )
    write_text(folder / "sets.html", page)
    (folder / "sets.svg").write_bytes(plot)
    publish(folder / "sets.md", TITLE, lines, tables)
    log.info("written: %s (sets.md, sets.tex, sets.html, sets.svg, measurements.csv, metrics.json)", folder)


def _sets(metrics: Mapping[str, Row]) -> Table:
    rows = []
    for name, each in metrics.items():
        found = {(row["metric"], row["arm"]): row for row in each["measurements"] if row["group"] is None}
        cells = [
            show(found[metric, arm]) if (metric, arm) in found else "-"
            for metric, arm, show in COLUMNS.values()
        ]
        rows.append([name, f"{each['answers']:,}", f"{100 * each['harmful'] / each['answers']:.1f}", *cells])
    return Table(title="Sets", header=["set", "n", "harmful, %", *COLUMNS], rows=rows)


def _published(metrics: Mapping[str, Row]) -> list[Table]:
    """Published figures on the measured sets, with this detector's own above them; none if there are none."""
    tables = []
    for metric, words in (("f1", "F1"), ("accuracy", "Accuracy")):
        figures, own = _figures(metrics, metric), _values(metrics, metric)
        if not figures:
            continue
        models = list(dict.fromkeys(model for of_set in figures.values() for model in of_set))
        cells = [
            [f"{100 * figures[name][model]:.1f}" if model in figures[name] else "-" for name in figures]
            for model in models
        ]
        notes = dict.fromkeys(
            f"{each['comparison']}: {each['source']}"
            for each in published()
            if each["set"] in figures and each["metric"] == metric
        )
        tables.append(
            Table(
                title=f"{words} of published guards, %",
                header=["guard", *figures],
                rows=[
                    ["this detector", *(share(own[name]) for name in figures)],
                    *([model, *row] for model, row in zip(models, cells, strict=True)),
                ],
                note=f"{'; '.join(notes)}. Published figures come without intervals.",
            )
        )
    return tables


def _values(metrics: Mapping[str, Row], metric: str) -> dict[str, Row]:
    """The detector's own measurement of a metric on each set."""
    return {
        name: row
        for name, each in metrics.items()
        for row in each["measurements"]
        if (row["metric"], row["arm"], row["group"]) == (metric, DETECTOR, None)
    }


def _figures(metrics: Mapping[str, Row], metric: str) -> dict[str, dict[str, float]]:
    """The published values of a metric on the sets that were measured whole: set -> guard -> value."""
    whole = [
        name
        for name, facts in metrics.items()
        if all(_is_whole(facts, each["answers"]) for each in published() if each["set"] == name)
    ]
    found: dict[str, dict[str, float]] = {}
    for each in published():
        if each["set"] in whole and each["metric"] == metric:
            found.setdefault(each["set"], {})[each["model"]] = float(each["value"])
    return found


def _is_whole(facts: Row, answers: str) -> bool:
    """Whether as many answers were measured as in the published figures; without their number, all."""
    return bool(facts["answers"] == int(answers) if answers else facts["split"] == "all")
