"""``asr.json``, and the same as files for people: ``asr.md``, ``asr.tex``, ``asr.csv``, ``asr.png``.

The numbers of a benchmark are made in ``summary``; this only brings benchmarks together and writes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_protector.evaluation.summary import JudgeInfo as JudgeInfo
from mllm_protector.files import write_bytes, write_json, write_text
from mllm_protector.records import Status
from mllm_protector.reporting.chart import chart
from mllm_protector.reporting.latex import latex
from mllm_protector.reporting.markdown import markdown

SCHEMA = 1
"""Of ``asr.json``; grows when a key changes its meaning."""

CELL_FIELDS = (
    "benchmark",
    "scenario",
    "variant",
    "arm",
    "judge",
    *(str(status) for status in Status),
    "judged",
    "unjudged",
    "asr",
    "low",
    "high",
    "bound_low",
    "bound_high",
)
"""The columns of ``asr.csv``."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What makes a spreadsheet run a text, also in full width (OWASP, "CSV injection")."""


def assemble(
    benchmarks: Mapping[str, Mapping[str, Any]],
    *,
    mllm: Mapping[str, Any],
    guard: Mapping[str, Mapping[str, Any]],
    arms: Sequence[str],
    judges: Mapping[str, JudgeInfo],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The content of ``asr.json``.

    Args:
        benchmarks: name -> what ``summarise_benchmark`` gave.
        mllm: what the answers depend on.
        guard: arm -> ``detector``, ``corrector``, ``threshold``; nothing for the arm without a guard.
        arms: their names, in the order of the tables.
        judges: what is known about each, in the order of the tables.
        notes: sentences that belong above the numbers.
    """
    return {
        "schema": SCHEMA,
        "mllm": dict(mllm),
        "arms": list(arms),
        "guard": {arm: dict(facts) for arm, facts in guard.items()},
        "judges": {
            name: {
                "identity": info.identity,
                "circular": info.circular,
                "note": info.note,
                "bias": None if info.bias is None else asdict(info.bias),
            }
            for name, info in judges.items()
        },
        "notes": list(notes),
        "benchmarks": {name: dict(entry) for name, entry in benchmarks.items()},
    }


def write_report(result: Mapping[str, Any], output_dir: Path) -> None:
    """Write ``asr.json``, ``asr.csv`` (the cells), ``asr.md``, ``asr.tex`` and ``asr.png``."""
    write_json(output_dir / "asr.json", result)
    write_text(output_dir / "asr.csv", cells_as_csv(result))
    write_text(output_dir / "asr.md", markdown(result))
    write_text(output_dir / "asr.tex", latex(result))
    write_bytes(output_dir / "asr.png", chart(result))


def cells_as_csv(result: Mapping[str, Any]) -> str:
    """The cells of all benchmarks as CSV that no spreadsheet runs as formulas."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CELL_FIELDS)  # lines end as in RFC 4180, or a lone CR would stay unquoted
    writer.writeheader()
    for name, entry in result["benchmarks"].items():
        for cell in entry["cells"]:
            row = {"benchmark": name, **cell}
            writer.writerow({field: _harmless(row[field]) for field in CELL_FIELDS})
    return out.getvalue()


def _harmless(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if formula else value
