"""The metrics of a detector and of a detoxifier for people, from ``metrics.json``: files and the terminal."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from mllm_protector.evaluation.detection import DETECTOR
from mllm_protector.evaluation.detector import MeasuredDetector
from mllm_protector.files import write_text
from mllm_protector.reporting.page import render
from mllm_protector.reporting.plots import curves
from mllm_protector.reporting.sets import report_sets
from mllm_protector.reporting.tables import (
    Row,
    Table,
    count,
    decimal,
    markdown,
    print_tables,
    publish,
    share,
    shown,
    tabulated,
    upright,
)

log = logging.getLogger(__name__)

DETECTOR_TITLE = "How well a harm detector tells harmful answers from harmless ones"
DETOXIFIER_TITLE = "What a detoxifier makes of harmful answers"

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
"""Metrics that people know by another name."""

MISTAKES = 20
"""The worst mistakes of either kind that are shown."""

LONGEST = 600
"""Characters of a text that are shown."""

NUMBERS = ("on_query", "on_query_control", "on_accepted", "on_accepted_control", "length_ratio", "perplexity")
"""The detoxifier's metrics that are no shares."""

BETTER = {
    **dict.fromkeys(("safe", "on_query", "on_accepted"), " \u2191"),
    **dict.fromkeys(("repeated", "canned", "copied", "faulty", "perplexity"), " \u2193"),
}
"""Which way is better, where one is."""

REFERENCES = ("accepted", "rejected")

READING = (
    "Columns: behind the guard's checks; the first rewrite unchecked; two baselines; the pairs' answers.",
    "In %: below the judge's threshold and not empty; a refusal by keywords; repeated in the same words for "
    "another query; canned: both; word 4-grams copied from the harmful answer; faulty by the checks.",
    "On query, on accepted: cosine (TF-IDF) with the query and with the accepted answer; control: with those "
    "of the other queries. Length ratio: words over the harmful answer's. Perplexity: to the untrained base, "
    "given nothing.",
    "In brackets: the 95 % interval, in which pairs with one query count as one draw; none where too few "
    "differ.",
)


def report_detector(measured: Sequence[MeasuredDetector]) -> None:
    """Write ``report.html`` and ``report.md`` of each set; print the tables, of several sets what sums up."""
    for each in measured:
        _report_set(each, printed=len(measured) == 1)
    if measured[0].metrics["set"] is not None:
        report_sets(measured)


def _report_set(measured: MeasuredDetector, *, printed: bool) -> None:
    metrics = upright(measured.metrics)
    rows = metrics["measurements"]
    lines = [_headline(rows), *_remarks(metrics), *(f"Note: {note}" for note in metrics["notes"])]
    tables = [
        _table(f"Group: {group}" if group else "Metrics", [row for row in rows if row["group"] == group])
        for group in dict.fromkeys([None, *(row["group"] for row in rows)])
    ]
    page = render(
        "detector.html.j2",
        title=DETECTOR_TITLE,
        folder=metrics["detector"]["folder"],
        headline=lines[0],
        remarks=_remarks(metrics),
        notes=metrics["notes"],
        plots=_curves(measured, rows),
        tables=[*tables, *_mistakes(measured)],
        facts={name: metrics[name] for name in ("detector", "data", "split", "seed")},
    )
    write_text(measured.folder / "report.html", page)
    write_text(measured.folder / "report.md", markdown(DETECTOR_TITLE, lines, tables))
    if printed:
        print_tables(DETECTOR_TITLE, lines, tables)
    log.info("written: %s (metrics.json, scores.jsonl, report.md, report.html)", measured.folder)


def report_detoxifier(measured: tuple[Mapping[str, Any], Path]) -> None:
    """Write ``rewrites.md`` and print the same; ``measured`` is what ``eval_detoxifier`` returns."""
    metrics, folder = measured
    judge, rows = metrics["judge"], metrics["measurements"]
    who = (
        f"Judge: the detector in {judge['folder']} (base {judge['base']}), "
        f"threshold {judge['threshold']:.4g}."
    )
    if judge["circular"]:
        who += (
            " Circular: it is the guard's own, which has discarded what it finds harmful, so the share of "
            "safe rewrites behind the guard says nothing; give another judge_detector."
        )
    lines = [
        f"{metrics['pairs']:,} harmful answers to {metrics['queries']:,} queries; at most"
        f" {metrics['guard']['max_rewrites']} attempts at each.",
        who,
        *(f"Note: {note}" for note in metrics["notes"]),
        *READING,
    ]
    marks = BETTER | ({"safe": " \u2191 (circular)"} if judge["circular"] else {})
    tables = [
        _table("Rewrites", [row for row in rows if row["arm"] not in REFERENCES], marks),
        _table("The pairs' own answers", [row for row in rows if row["arm"] in REFERENCES], marks),
    ]
    publish(folder / "rewrites.md", DETOXIFIER_TITLE, lines, tables)
    log.info("written: %s (metrics.json, rewrites.jsonl, rewrites.md)", folder)


def _table(title: str, rows: Sequence[Row], marks: Mapping[str, str] | None = None) -> Table:
    """Metrics down, arms across; with ``marks`` it is a detoxifier's, whose metrics are shares."""
    show = decimal if marks is None else _rewriting

    def cell(row: Row) -> str:
        return count(row) if isinstance(row["value"], int) else show(row)

    return tabulated(
        title,
        rows,
        {"metric": "metric"},
        [(BASELINES.get(arm, arm), arm, cell) for arm in dict.fromkeys(row["arm"] for row in rows)],
        across=itemgetter("arm"),
        named=lambda _, name: NAMES.get(name, name.replace("_", " ")) + (marks or {}).get(name, ""),
    )


def _rewriting(row: Row) -> str:
    if row["metric"] not in NUMBERS:
        return share(row)
    return shown(row, ",.0f" if (row["value"] or 0) >= 100 else ",.2f")


def _value(rows: Sequence[Row], metric: str, arm: str = DETECTOR) -> Row | None:
    """The measurement of a metric on all answers."""
    key = (metric, arm, None)
    return next((row for row in rows if (row["metric"], row["arm"], row["group"]) == key), None)


def _headline(rows: Sequence[Row]) -> str:
    """The detector's AUROC, and whether it is significantly above those of the baselines."""
    verdicts = []
    for arm, name in BASELINES.items():
        own, difference = _value(rows, "auroc", arm), _value(rows, "auroc_difference", arm)
        if own and difference:
            verdict = "not significantly different from"
            if (difference["low"] or 0) > 0:
                verdict = "better than"
            elif (difference["high"] or 0) < 0:
                verdict = "worse than"
            verdicts.append(f"{verdict} the {name}'s {decimal(own)}")
    own = _value(rows, "auroc")
    if own is None:  # answers with one kind of label
        found = [(each, _value(rows, each)) for each in ("false_positive_rate", "recall")]
        return "; ".join(
            f"{name.replace('_', ' ')} {share(row)} %" for name, row in found if row and row["n"]
        )
    return f"AUROC {decimal(own)}: {'; '.join(verdicts) or 'not compared with a baseline'}."


def _remarks(metrics: Mapping[str, Any]) -> list[str]:
    """What was measured, with which threshold, and what the baselines are."""
    lines = [
        f"{metrics['answers']:,} answers, {metrics['harmful']:,} of them harmful, to {metrics['queries']:,} "
        f"queries ({metrics['split']} part of: {metrics['data']['account']}).",
        f"Threshold {metrics['threshold']:.4g} ({metrics['threshold_how'] or 'not known how chosen'}), "
        f"temperature {metrics['temperature']:.4g}, offset {metrics['offset']:.4g} "
        f"({metrics['scale_how'] or 'not known how chosen'}).",
        *(
            f"{BASELINES[name].capitalize()}: TF-IDF and logistic regression ({found['variant']}), "
            f"trained on {found['taught_on']}; threshold {found['threshold']}. "
            f"AUROC by cross-validation there: "
            f"{', '.join(f'{variant} {auroc:.3f}' for variant, auroc in found['validated'].items())}."
            for name, found in metrics["baselines"].items()
        ),
        "In brackets: the 95 % interval, in which all answers to one query count as one draw.",
    ]
    if "in_domain_baseline" in metrics["baselines"]:
        lines.append(
            "The in-domain baseline was trained on labels of this data set. For a detector trained on other "
            "data it is no rival: it shows how much the words alone reveal here."
        )
    return lines


def _curves(measured: MeasuredDetector, rows: Sequence[Row]) -> dict[str, bytes]:
    if len(set(measured.labels)) < 2:
        return {}
    arms = {DETECTOR: DETECTOR} | {arm: name for arm, name in BASELINES.items() if arm in measured.scores}
    marks = {}
    for arm, name in arms.items():
        point = [_value(rows, metric, arm) for metric in ("false_positive_rate", "recall", "precision")]
        values = [row["value"] for row in point if row and row["value"] is not None]
        if len(values) == len(point):
            marks[name] = tuple(values)
    scores = {name: measured.scores[arm] for arm, name in arms.items()}
    return curves(measured.labels, scores, uncalibrated=measured.uncalibrated, marks=marks)


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
                    [f"{scores[place]:.3f}", *map(_cut, upright(list(measured.texts[place])))]
                    for place in wrong[:MISTAKES]
                ],
                words=3,
                folded=True,
            )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
