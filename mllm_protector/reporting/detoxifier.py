"""A detoxifier's metrics for people: ``rewrites.md`` and a print on the terminal, from ``metrics.json``."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_protector.files import write_text
from mllm_protector.reporting.columns import Row
from mllm_protector.reporting.tables import Table, decimal, markdown, print_tables, with_interval

log = logging.getLogger(__name__)

TITLE = "What a detoxifier makes of harmful answers"

NUMBERS = ("on_query", "on_query_control", "on_accepted", "on_accepted_control", "length_ratio", "perplexity")
"""The metrics that are no shares."""

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


def report(measured: tuple[Mapping[str, Any], Path]) -> None:
    """Write ``rewrites.md`` and print the same.

    Args:
        measured: what ``eval_detoxifier`` returns.
    """
    metrics, folder = measured
    lines = [*_remarks(metrics), *READING]
    circular = metrics["judge"]["circular"]
    rows = metrics["measurements"]
    tables = [
        _table("Rewrites", [row for row in rows if row["arm"] not in REFERENCES], circular),
        _table("The pairs' own answers", [row for row in rows if row["arm"] in REFERENCES], circular),
    ]
    write_text(folder / "rewrites.md", markdown(TITLE, lines, tables))
    print_tables(TITLE, lines, tables)
    log.info("written: %s (metrics.json, rewrites.jsonl, rewrites.md)", folder)


def _remarks(metrics: Mapping[str, Any]) -> Sequence[str]:
    """What was measured, who judged, and what weakens the metrics."""
    return [
        f"{metrics['pairs']:,} harmful answers to {metrics['queries']:,} queries; at most"
        f" {metrics['guard']['max_rewrites']} attempts at each.",
        _judge(metrics["judge"]),
        *(f"Note: {note}" for note in metrics["notes"]),
    ]


def _judge(judge: Mapping[str, Any]) -> str:
    who = (
        f"Judge: the detector in {judge['folder']} (base {judge['base']}), threshold {judge['threshold']:.4g}"
    )
    if not judge["circular"]:
        return f"{who}."
    return (
        f"{who}. Circular: it is the guard's own, which has discarded what it finds harmful, so the share of "
        "safe rewrites behind the guard says nothing; give another judge_detector."
    )


def _table(title: str, rows: Sequence[Row], circular: bool) -> Table:
    """Metrics down, arms across."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["metric"], row["arm"]): _cell(row) for row in rows}
    marks = BETTER | ({"safe": " \u2191 (circular)"} if circular else {})
    return Table(
        title=title,
        header=["metric", *arms],
        rows=[
            [name.replace("_", " ") + marks.get(name, ""), *(cells.get((name, arm), "-") for arm in arms)]
            for name in dict.fromkeys(row["metric"] for row in rows)
        ],
    )


def _cell(row: Row) -> str:
    value, low, high = row["value"], row["low"], row["high"]
    if isinstance(value, int):
        return f"{value:,}"
    if row["metric"] not in NUMBERS:
        return with_interval(value, low, high)
    digits = 0 if value is not None and value >= 100 else 2
    shown = [decimal(each, digits) for each in (value, low, high)]
    return shown[0] if low is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"
