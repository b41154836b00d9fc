"""The table of ``measure_latency``."""

from pathlib import Path
from typing import Any

from mllm_protector.files import write_text
from mllm_protector.reporting.tables import Table, markdown, print_tables

TITLE = "What the guard adds to the time of an answer"
NAMES = {"detector": "score (every answer)", "rewriting": "one rewrite and its score (a flagged answer)"}


def report_latency(measured: tuple[dict[str, Any], Path]) -> None:
    """Print the latencies, and write them to ``latency.md``."""
    result, folder = measured
    rows = result["measurements"]
    found = {(row["arm"], row["group"], row["metric"]): row for row in rows}
    table = Table(
        title="Milliseconds",
        header=["", "tokens of the answer", "answers", "median", "95th percentile"],
        rows=[
            [
                NAMES[arm],
                length,
                str(found[arm, length, "median_ms"]["n"]),
                *(f"{found[arm, length, metric]['value']:,.0f}" for metric in ("median_ms", "p95_ms")),
            ]
            for arm, length in dict.fromkeys((row["arm"], row["group"]) for row in rows)
        ],
    )
    memory = ", ".join(f"{name} {peak:,.0f} MiB" for name, peak in result["peak_memory_mib"].items())
    lines = [
        f"One answer at a time on {result['device']}, {result['threads']} thread(s); peak memory: {memory}."
    ]
    print_tables(TITLE, lines, [table])
    write_text(folder / "latency.md", markdown(TITLE, lines, [table]))
