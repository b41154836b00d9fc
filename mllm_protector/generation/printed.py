"""The account of a generation, on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_protector.reporting.tables import Table, print_tables

ENDS = {"calls for questions": "question_calls", "dropped": "dropped", "labels": "verification"}
HEADER = ("scenario", "wanted", "asked", "dropped", "written", "confirmed")


def print_account(result: Mapping[str, Any], folder: Path) -> None:
    """Print what was written, what was dropped and why, and what was spent.

    Args:
        result: the content of ``generation.json``.
        folder: where that lies.
    """
    everything = result["total"]
    rows = [_row(name, account) for name, account in result["scenarios"].items()]
    ends = [
        (title, end, f"{count:,}") for title, name in ENDS.items() for end, count in everything[name].items()
    ]
    spent = [
        [purpose, *(f"{counts[name]:,}" for name in counts)]
        for purpose, counts in {**result["spent"]["by_purpose"], "total": result["spent"]["total"]}.items()
    ]
    limits = result["budget"]
    lines = [
        f"asked {everything['asked']:,} = written {everything['written']:,}"
        f" + dropped {sum(everything['dropped'].values()):,}",
        f"budget: {_limit(limits['calls'])} calls, {_limit(limits['tokens'])} tokens"
        + (f"; ended early: {result['ended_by']}" if result["ended_by"] else ""),
    ]
    if everything["written"]:
        lines.append(f"train with: data=pairs data.path={folder / 'pairs.jsonl'}")
    print_tables(
        "New pairs",
        lines,
        [
            Table(title="By scenario", header=HEADER, rows=[*rows, _row("total", everything)]),
            Table(title="What became of it", header=("of", "end", "count"), rows=ends, words=2),
            Table(
                title="Spent by all runs on this folder",
                header=("for", "calls", "tokens sent", "tokens received", "tokens assumed"),
                rows=spent,
            ),
        ],
    )


def _row(name: str, account: Mapping[str, Any]) -> list[str]:
    counts = (
        account["wanted"],
        account["asked"],
        sum(account["dropped"].values()),
        account["written"],
        account["verification"].get("confirmed", 0),
    )
    return [name, *(f"{count:,}" for count in counts)]


def _limit(number: int | None) -> str:
    return "any number of" if number is None else f"{number:,}"
