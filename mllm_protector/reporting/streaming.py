"""The tables of ``measure_streaming``."""

from functools import partial
from pathlib import Path
from typing import Any

from mllm_protector.reporting.tables import Column, publish, share, shown, tabulated

TITLE = "What judged streams let pass"
KEYS = {"arm": "", "group": "threshold"}
COLUMNS: tuple[Column, ...] = (
    ("harmful text shown, %", "harmful_shown", share),
    ("of it before a stop, %", "shown_before_stop", share),
    ("harmful never stopped, %", "never_stopped", share),
    ("harmless stopped, %", "false_cuts", share),
    ("tokens before first words", "delay_tokens", partial(shown, form=".1f")),
)


def report_streaming(measured: tuple[dict[str, Any], Path]) -> None:
    """Print what is shown of harmful answers at each threshold, and write it to ``streaming.md``."""
    result, folder = measured
    rows = result["measurements"]
    chosen = {arm: f"{threshold:.4g}" for arm, threshold in result["chosen"].items() if threshold is not None}
    at_chosen = [row for place in chosen.items() for row in rows if (row["arm"], row["group"]) == place]
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
        tabulated(
            f"At most {100 * result['false_cuts']:g} % of harmless answers stopped",
            at_chosen,
            KEYS,
            COLUMNS,
            note="Each threshold was chosen on these very answers.",
        ),
        tabulated("At each threshold", rows, KEYS, COLUMNS),
    ]
    publish(folder / "streaming.md", TITLE, lines, tables)
