"""The tables of ``measure_streaming``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_protector.files import write_text
from mllm_protector.reporting.tables import Row, Table, markdown, print_tables, share, shown

TITLE = "What judged streams let pass"
METRICS = {
    "harmful_shown": "harmful text shown, %",
    "shown_before_stop": "of it before a stop, %",
    "never_stopped": "harmful never stopped, %",
    "false_cuts": "harmless stopped, %",
    "delay_tokens": "tokens before first words",
}


def report_streaming(measured: tuple[dict[str, Any], Path]) -> None:
    """Print what is shown of harmful answers at each threshold, and write it to ``streaming.md``."""
    result, folder = measured
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["measurements"]:
        found.setdefault((row["arm"], row["group"]), {})[row["metric"]] = row
    chosen = {arm: f"{threshold:.4g}" for arm, threshold in result["chosen"].items() if threshold is not None}
    lines = [
        f"{result['answers']:,} answers, {result['harmful']:,} of them harmful, to {result['queries']:,} "
        f"questions; a window has {result['window_tokens']} tokens of 4 bytes. window 2: two flagged "
        "prefixes in a row cut. buffer: all is judged before any of it is shown.",
        "Labels are of whole answers: every character of an answer labelled harmful counts as harmful, also "
        "before its harm begins.",
        "Stopped is an answer that is cut or, before any of it was shown, replaced. The delay is that of "
        "harmless answers. In brackets: the 95 % interval. Shares of text are of all harmful text.",
        *result["notes"],
    ]
    tables = [
        _table(
            f"At most {100 * result['false_cuts']:g} % of harmless answers stopped",
            {place: found[place] for place in chosen.items()},
            note="Each threshold was chosen on these very answers.",
        ),
        _table("At each threshold", found),
    ]
    print_tables(TITLE, lines, tables)
    write_text(folder / "streaming.md", markdown(TITLE, lines, tables))


def _table(title: str, found: Mapping[tuple[str, str], Mapping[str, Row]], note: str = "") -> Table:
    return Table(
        title=title,
        note=note,
        header=["", "threshold", *METRICS.values()],
        rows=[
            [
                arm,
                threshold,
                *(share(rows[name]) for name in list(METRICS)[:4]),
                shown(rows["delay_tokens"], ".1f"),
            ]
            for (arm, threshold), rows in found.items()
        ],
    )
