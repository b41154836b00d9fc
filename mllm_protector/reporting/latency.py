"""The table of ``measure_latency``."""

from pathlib import Path
from typing import Any

from mllm_protector.reporting.tables import count, publish, tabulated, total

TITLE = "What the guard adds to the time of an answer"
NAMES = {"detector": "score (every answer)", "rewriting": "one rewrite and its score (a flagged answer)"}


def report_latency(measured: tuple[dict[str, Any], Path]) -> None:
    """Print the latencies, and write them to ``latency.md``."""
    result, folder = measured
    table = tabulated(
        "Milliseconds",
        result["measurements"],
        {"arm": "", "group": "tokens of the answer"},
        [
            ("answers", "median_ms", total),
            ("median", "median_ms", count),
            ("95th percentile", "p95_ms", count),
        ],
        named=lambda _, name: NAMES.get(name, name),
    )
    memory = ", ".join(f"{name} {peak:,.0f} MiB" for name, peak in result["peak_memory_mib"].items())
    lines = [
        f"One answer at a time on {result['device']}, {result['threads']} thread(s); peak memory: {memory}."
    ]
    publish(folder / "latency.md", TITLE, lines, [table])
