"""A detector's figures for people: ``report.html``, ``report.md`` and a print, all from ``metrics.json``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_protector.reporting.curves import curves
from mllm_protector.reporting.layout import (
    Table,
    data_uri,
    decimal,
    render,
    upright,
    with_interval,
)
from mllm_protector.reporting.markdown import tables_in_markdown
from mllm_protector.reporting.printed import print_tables

TITLE = "How well a harm detector tells harmful answers from harmless ones"

RANKING = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "pairwise_accuracy": "pairs in the right order",
}
DECIDING = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "false_positive_rate": "false positive rate",
}
COUNTS = {
    "found": "harmful, flagged",
    "missed": "harmful, not flagged",
    "false_alarms": "harmless, flagged",
    "rejected": "harmless, not flagged",
}

BASELINES = {"baseline": "baseline", "in_domain_baseline": "in-domain baseline"}
"""Their names in ``metrics.json`` and for people."""

MISTAKES = 10
"""So many of each kind are shown."""

LONGEST = 600
"""Characters of a text on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the page shows.

    Attributes:
        metrics: the content of ``metrics.json``.
        labels: True for harmful.
        scores: what scored (``detector``, and its baselines) -> P(harmful) of each answer.
        uncalibrated: the detector's before calibration: at temperature 1 and offset 0.
        flagged: what the detector's threshold makes of each answer.
        texts: query and answer of each; empty to show none.
    """

    metrics: Mapping[str, Any]
    labels: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    uncalibrated: Sequence[float]
    flagged: Sequence[bool]
    texts: Sequence[tuple[str, str]]


def page(measured: Measured) -> str:
    """The whole page as HTML."""
    metrics = upright(measured.metrics)
    marks = {
        name: (figures["false_positive_rate"], figures["recall"], figures["precision"])
        for name, figures in {"detector": metrics, **_named(metrics["baselines"])}.items()
        if figures["precision"] is not None
    }
    plots = curves(
        measured.labels,
        {"detector": measured.scores["detector"], **_named(measured.scores)},
        uncalibrated={"detector before calibration": measured.uncalibrated} if _scaled(metrics) else {},
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
        tables=[*tables(metrics), *_mistakes(measured)],
        facts=json.dumps(
            {name: metrics[name] for name in ("detector", "data", "split", "seed", "group_thresholds")},
            indent=2,
            ensure_ascii=False,
        ),
    )


def print_summary(metrics: Mapping[str, Any]) -> None:
    """The headline, what has to be known to read it, and the tables."""
    print_tables(TITLE, _lines(metrics), _unfolded(metrics))


def document(metrics: Mapping[str, Any]) -> str:
    """What is printed, in Markdown."""
    return tables_in_markdown(TITLE, _lines(metrics), _unfolded(metrics))


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    metrics = upright(metrics)
    return [headline(metrics), *remarks(metrics), *(f"Note: {note}" for note in metrics["notes"])]


def _unfolded(metrics: Mapping[str, Any]) -> list[Table]:
    return [table for table in tables(upright(metrics)) if not table.folded]


def headline(metrics: Mapping[str, Any]) -> str:
    """The detector's AUROC, and whether it is shown to be above those of the baselines."""
    own = f"AUROC {_bracketed(metrics, 'auroc')}"
    verdicts = [
        f"{_verdict(metrics['against'][name]['auroc'])} the {BASELINES[name]}'s {_bracketed(found, 'auroc')}"
        for name, found in metrics["baselines"].items()
    ]
    return f"{own}: {'; '.join(verdicts) or 'there is no baseline to compare it with'}."


def _verdict(difference: Mapping[str, float | None]) -> str:
    low, high = difference["low"], difference["high"]
    if low is not None and low > 0:
        return "better than"
    return "worse than" if high is not None and high < 0 else "not shown to differ from"


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    """On what was measured, with which threshold, and what the baselines are."""
    lines = [
        f"{metrics['answers']:,} answers, {metrics['harmful']:,} of them harmful, to {metrics['queries']:,} "
        f"queries ({metrics['split']} part of: {metrics['data']['account']}).",
        f"Threshold {metrics['threshold']:.4g} ({metrics['threshold_how'] or 'not known how chosen'}), "
        f"temperature {metrics['temperature']:.4g}, offset {metrics['offset']:.4g} "
        f"({metrics['scale_how'] or 'not known how chosen'}).",
        *(
            f"{BASELINES[name].capitalize()}: TF-IDF and logistic regression ({found['variant']}), taught on "
            f"{found['taught_on']}; threshold {found['threshold']}."
            for name, found in metrics["baselines"].items()
        ),
    ]
    if "in_domain_baseline" in metrics["baselines"]:
        lines.append(
            "The in-domain baseline knows the labels of this very set. For a detector that was trained with "
            "other data it is no rival, but what words alone can tell here."
        )
    return lines


def _named(by_key: Mapping[str, Any]) -> dict[str, Any]:
    """The baselines among some values, by the names that people read."""
    return {shown: by_key[name] for name, shown in BASELINES.items() if name in by_key}


def _scaled(metrics: Mapping[str, Any]) -> bool:
    """Whether calibration changed the scores."""
    return (metrics["temperature"], metrics["offset"]) != (1.0, 0.0)


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The numbers: order, decisions, calibration, groups, and how the baselines were chosen."""
    return [table for table in _tables(metrics) if table.rows]


def _tables(metrics: Mapping[str, Any]) -> Iterator[Table]:
    baselines, against = _named(metrics["baselines"]), _named(metrics["against"])
    header = ["", "detector", *baselines]
    columns = [metrics, *baselines.values()]
    yield Table(
        title="Order of the answers",
        header=[*header, *(f"detector - {name}" for name in against)],
        rows=[
            [name, *(_bracketed(column, key) for column in columns)]
            + [_difference(found.get(key)) for found in against.values()]
            for key, name in RANKING.items()
            if metrics[key] is not None
        ],
        note="In brackets: the 95 % interval, in which all answers to one query count as one draw. "
        "AUROC: how often a harmful answer scores above a harmless one.",
    )
    yield Table(
        title="Decisions at the threshold",
        header=header,
        rows=[
            *([name, *(_bracketed(column, key) for column in columns)] for key, name in DECIDING.items()),
            *([name, *(f"{column[key]:,}" for column in columns)] for key, name in COUNTS.items()),
        ],
        note="False positive rate: the share of harmless answers that are flagged.",
    )
    before, after = ("_before_calibration", " before calibration"), ("", " after")
    endings = (before, after) if _scaled(metrics) else (("", ""),)
    yield Table(
        title="Calibration, lower is better",
        header=header,
        rows=[
            [f"{name}{when}", decimal(metrics[f"{key}{ending}"], 3)]
            + ["-" if ending else decimal(found[key], 3) for found in baselines.values()]
            for key, name in (("ece", "ECE"), ("brier", "Brier score"))
            for ending, when in endings
        ],
        note="ECE: the mean distance between score and share of harmful answers, over 15 bins.",
    )
    yield Table(
        title="By group",
        header=["group", "answers", "harmful", "AUROC"]
        + [f"{shown}'s AUROC" for shown in baselines]
        + ["recall", "false positive rate"],
        rows=[
            [
                row["group"],
                f"{row['answers']:,}",
                f"{row['harmful']:,}",
                decimal(row["auroc"], 3),
                *(decimal(row[f"{name}_auroc"], 3) for name in metrics["baselines"]),
                *(
                    with_interval(row[key], row[f"{key}_low"], row[f"{key}_high"])
                    for key in ("recall", "false_positive_rate")
                ),
            ]
            for row in metrics["groups"]
        ],
        note="Recall and false positive rate in %. No AUROC where all answers of a group have one label.",
    )
    yield Table(
        title="How the baselines were chosen: AUROC on what they are taught on, by cross-validation",
        header=["variant", "AUROC"],
        rows=[
            [f"{shown}: {variant}", decimal(auroc, 3)]
            for shown, found in baselines.items()
            for variant, auroc in found["validated"].items()
        ],
        folded=True,
    )


def _mistakes(measured: Measured) -> Iterator[Table]:
    """The harmless answers with the highest scores, and the harmful ones with the lowest."""
    scores = measured.scores["detector"]
    for harmful, title in (
        (False, "Harmless answers that score highest among the flagged"),
        (True, "Harmful answers that score lowest among those not flagged: may be harmful to read"),
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


def _bracketed(figures: Mapping[str, Any], key: str) -> str:
    value, low, high = (decimal(figures[name], 3) for name in (key, f"{key}_low", f"{key}_high"))
    return value if low == "-" else f"{value} [{low}, {high}]"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    shown = f"{found['difference']:+.3f}"
    return shown if found["low"] is None else f"{shown} [{found['low']:+.3f}, {found['high']:+.3f}]"
