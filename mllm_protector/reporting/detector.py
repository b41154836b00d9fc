"""A detector's metrics for people: ``report.html``, ``report.md`` and a print on the terminal."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_protector.evaluation.detection import DETECTOR
from mllm_protector.evaluation.detector import MeasuredDetector
from mllm_protector.files import write_text
from mllm_protector.reporting.columns import Row, decimal_cell
from mllm_protector.reporting.curves import curves
from mllm_protector.reporting.html import data_uri, render
from mllm_protector.reporting.tables import (
    Table,
    decimal,
    markdown,
    print_tables,
    upright,
)

log = logging.getLogger(__name__)

TITLE = "How well a harm detector tells harmful answers from harmless ones"

BASELINES = {"baseline": "baseline", "in_domain_baseline": "in-domain baseline"}
NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "pairwise_accuracy": "pairs in the right order",
    "auroc_difference": "AUROC, detector minus baseline",
    "average_precision_difference": "average precision, detector minus baseline",
    "f1": "F1",
    "ece": "ECE",
    "brier": "Brier score",
}
"""What people read; other metrics are named as they are."""

MISTAKES = 20
"""The worst mistakes of either kind that are shown."""

LONGEST = 600
"""Characters of a text that are shown."""


def report(measured: MeasuredDetector) -> None:
    """Write ``report.html`` and ``report.md``, and print the tables."""
    metrics = upright(measured.metrics)
    lines = [headline(metrics), *remarks(metrics), *(f"Note: {note}" for note in metrics["notes"])]
    shown = tables(metrics)
    write_text(measured.folder / "report.html", _page(measured, metrics, shown))
    write_text(measured.folder / "report.md", markdown(TITLE, lines, shown))
    print_tables(TITLE, lines, shown)
    log.info("written: %s (metrics.json, scores.jsonl, report.md, report.html)", measured.folder)


def value(
    metrics: Mapping[str, Any], metric: str, arm: str = DETECTOR, group: str | None = None
) -> Row | None:
    """The measurement of a metric; ``None`` if there is none."""
    return next(
        (
            row
            for row in metrics["measurements"]
            if (row["metric"], row["arm"], row["group"]) == (metric, arm, group)
        ),
        None,
    )


def headline(metrics: Mapping[str, Any]) -> str:
    """The detector's AUROC, and whether it is shown to be above those of the baselines."""
    verdicts = []
    for arm, name in BASELINES.items():
        own, difference = value(metrics, "auroc", arm), value(metrics, "auroc_difference", arm)
        if own and difference:
            verdicts.append(f"{_verdict(difference)} the {name}'s {decimal_cell(own)}")
    own = value(metrics, "auroc")
    said = "; ".join(verdicts) or "there is no baseline to compare it with"
    return f"AUROC {decimal_cell(own) if own else '-'}: {said}."


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    """What was measured, with which threshold, and what the baselines are."""
    lines = [
        f"{metrics['answers']:,} answers, {metrics['harmful']:,} of them harmful, to {metrics['queries']:,} "
        f"queries ({metrics['split']} part of: {metrics['data']['account']}).",
        f"Threshold {metrics['threshold']:.4g} ({metrics['threshold_how'] or 'not known how chosen'}), "
        f"temperature {metrics['temperature']:.4g}, offset {metrics['offset']:.4g} "
        f"({metrics['scale_how'] or 'not known how chosen'}).",
        *(
            f"{BASELINES[name].capitalize()}: TF-IDF and logistic regression ({found['variant']}), taught on "
            f"{found['taught_on']}; threshold {found['threshold']}. AUROC by cross-validation there: "
            f"{', '.join(f'{variant} {auroc:.3f}' for variant, auroc in found['validated'].items())}."
            for name, found in metrics["baselines"].items()
        ),
        "In brackets: the 95 % interval, in which all answers to one query count as one draw.",
    ]
    if "in_domain_baseline" in metrics["baselines"]:
        lines.append(
            "The in-domain baseline knows the labels of this very set. For a detector that was trained with "
            "other data it is no rival, but what words alone can tell here."
        )
    return lines


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Every metric of every arm, then those of each group."""
    rows = metrics["measurements"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    found = [_table("Metrics", [row for row in rows if row["group"] is None])]
    for group in groups:
        if group is not None:
            found.append(_table(f"Group: {group}", [row for row in rows if row["group"] == group]))
    return found


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Metrics down, what scored across."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["metric"], row["arm"]): _cell(row) for row in rows}
    names = dict.fromkeys(row["metric"] for row in rows)
    return Table(
        title=title,
        header=["metric", *(BASELINES.get(arm, arm) for arm in arms)],
        rows=[
            [NAMES.get(name, name.replace("_", " ")), *(cells.get((name, arm), "-") for arm in arms)]
            for name in names
        ],
    )


def _cell(row: Row) -> str:
    if row["metric"] in ("tp", "fp", "fn", "tn"):
        return f"{row['value']:,}"
    return decimal_cell(row)


def _verdict(difference: Row) -> str:
    low, high = difference["low"], difference["high"]
    if low is not None and low > 0:
        return "better than"
    return "worse than" if high is not None and high < 0 else "not significantly different from"


def _page(measured: MeasuredDetector, metrics: Mapping[str, Any], shown: Sequence[Table]) -> str:
    arms = {DETECTOR: DETECTOR} | {arm: name for arm, name in BASELINES.items() if arm in measured.scores}
    marks = {}
    for arm, name in arms.items():
        point = [value(metrics, metric, arm) for metric in ("false_positive_rate", "recall", "precision")]
        values = [row["value"] for row in point if row and row["value"] is not None]
        if len(values) == len(point):
            marks[name] = tuple(values)
    plots = curves(
        measured.labels,
        {name: measured.scores[arm] for arm, name in arms.items()},
        uncalibrated=measured.uncalibrated,
        marks=marks,
    )
    return render(
        "detector.html.j2",
        title=TITLE,
        folder=metrics["detector"]["folder"],
        headline=headline(metrics),
        remarks=remarks(metrics),
        notes=metrics["notes"],
        plots={title: data_uri(content, "image/svg+xml") for title, content in plots.items()},
        tables=[*shown, *_mistakes(measured)],
        facts=json.dumps(
            {name: metrics[name] for name in ("detector", "data", "split", "seed")},
            indent=2,
            ensure_ascii=False,
        ),
    )


def _mistakes(measured: MeasuredDetector) -> Iterator[Table]:
    """The harmless answers with the highest scores, and the harmful ones with the lowest."""
    scores = measured.scores[DETECTOR]
    for harmful, title in (
        (False, "False positives with the highest scores"),
        (True, "False negatives with the lowest scores: may be harmful to read"),
    ):
        wrong = [
            place
            for place in range(len(measured.texts))
            if measured.labels[place] == harmful and measured.flagged[place] != harmful
        ]
        wrong.sort(key=lambda place: scores[place], reverse=not harmful)
        if wrong:
            yield Table(
                title=title,
                header=["score", "query", "answer"],
                rows=[
                    [decimal(scores[place], 3), *map(_cut, upright(list(measured.texts[place])))]
                    for place in wrong[:MISTAKES]
                ],
                words=3,
                folded=True,
            )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
