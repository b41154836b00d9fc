"""The tables and the plot of ``eval_robustness``."""

import logging
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from mllm_protector.evaluation.attacks import ALL
from mllm_protector.evaluation.measurements import as_csv
from mllm_protector.evaluation.robustness import ARMS, AS_WRITTEN, DECIPHERED
from mllm_protector.files import write_text
from mllm_protector.reporting.plots import points
from mllm_protector.reporting.tables import Row, Table, decimal, latex, publish, share, tabulated, upright

log = logging.getLogger(__name__)

TITLE = "A detector under rewritten answers"

COLUMNS = (
    ("recall", "recall", share),
    ("recall, to plain", "recall_difference", share),
    ("false positive rate", "false_positive_rate", share),
    ("false positive rate, to plain", "false_positive_rate_difference", share),
    ("AUROC", "auroc", decimal),
)


def report_robustness(measured: tuple[dict[str, Any], Path] | None) -> None:
    """Print the tables; write ``robustness.md``, ``.tex`` and ``.svg``, and ``measurements.csv``."""
    if measured is None:
        return
    result, folder = upright(measured[0]), measured[1]
    rows = result["measurements"]
    found = {(row["arm"], row["metric"], row["group"]): row for row in rows}
    names = [row["group"] for row in rows if (row["arm"], row["metric"]) == (AS_WRITTEN, "recall")]
    told = result["rewriting_notes"]
    deciphered = [name for name in names if _differs(found, name)]
    lines = [
        f"Detector {result['detector']['folder']}; threshold {result['threshold']:.4g} "
        f"({result['threshold_how']}).",
        f"{result['harmful']} harmful and {result['answers'] - result['harmful']} harmless answers. Recall "
        "and false positive rate in %, differences in percentage points, paired. In brackets: the 95 % "
        "interval, in which all answers to one query count as one draw.",
        f"Reading what seems to be in a code changed the score of {result['plain_changed']} of "
        f"{result['answers']} answers as they are.",
        *(
            f"{', '.join(name for name, each in told.items() if each == note)}: {note}."
            for note in dict.fromkeys(told.values())
        ),
        *result["notes"],
    ]
    tables = [
        _table("As written", AS_WRITTEN, names, rows),
        *([_table("With what seems to be in a code", DECIPHERED, deciphered, rows)] if deciphered else []),
        _best_of(len(result["attacks"]), rows),
    ]
    series = {
        f"{word}, {arm}": {
            name: found[arm, metric, name] for name in names if arm == AS_WRITTEN or name in deciphered
        }
        for metric, word in (("recall", "recall"), ("false_positive_rate", "false positive rate"))
        for arm in ARMS
        if arm == AS_WRITTEN or deciphered
    }
    plot = points(
        series, "share of answers flagged in %, with 95% intervals", "Answers flagged when rewritten"
    )
    write_text(folder / "robustness.tex", latex(lines, tables))
    write_text(folder / "measurements.csv", as_csv(rows))
    (folder / "robustness.svg").write_bytes(plot)
    publish(folder / "robustness.md", TITLE, lines, tables)
    log.info("written: %s (robustness.json, .md, .tex, .svg, measurements.csv)", folder)


def _differs(found: dict[tuple[str, str, str], Row], name: str) -> bool:
    """Whether any figure of a transformation changes by deciphering."""
    metrics = [metric for _, metric, _ in COLUMNS if (AS_WRITTEN, metric, name) in found]
    return any(
        found[AS_WRITTEN, each, name]["value"] != found[DECIPHERED, each, name]["value"] for each in metrics
    )


def _table(title: str, arm: str, names: Sequence[str], rows: Sequence[Row]) -> Table:
    own = [row for row in rows if row["arm"] == arm and row["group"] in names]
    return tabulated(title, own, {"group": ""}, COLUMNS, named=lambda _, name: name.replace("_", " "))


def _best_of(attacks: int, rows: Sequence[Row]) -> Table:
    """What is still caught of an attacker who may try several rewritings."""
    recall = [(f"recall, {arm}", ("recall_best_of", arm), share) for arm in ARMS]
    return tabulated(
        "Recall if an attacker tries several",
        rows,
        {"group": "rewritings tried"},
        [*recall, ("gain", ("recall_best_of_gain", DECIPHERED), share)],
        across=itemgetter("metric", "arm"),
        named=lambda _, tried: f"all {attacks}" if tried == ALL else tried,
        note="An answer is caught if every rewriting that was tried is flagged; which are tried is drawn at "
        "random, the answer as it is among them. Rewritings that may cut off the harm are not counted.",
    )
