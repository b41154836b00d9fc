"""The questions of MM-SafetyBench's published layout, by one digest of ids, scenarios, variants and words."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tests.frozen.scripts import read_rows, run_script


def compute(home: Path) -> dict[str, Any]:
    """Of a small layout that is made on the spot."""
    run_script("list_questions", "benchmarks.toy.per_scenario=2", f"output_dir={home / 'made'}")
    made = home / "made" / "toy_benchmark"
    return {
        "all": listed(made, home),
        "few": listed(made, home, "benchmarks.mmsafety.limit=1", "benchmarks.mmsafety.variants=[SD,TEXT]"),
    }


def listed(root: Path, home: Path, *overrides: str) -> dict[str, Any]:
    """The number of questions and their digest."""
    output = home / "listed"
    shutil.rmtree(output, ignore_errors=True)
    run_script(
        "list_questions",
        "benchmark=[mmsafety]",
        f"benchmarks.mmsafety.root={root}",
        f"output_dir={output}",
        *overrides,
    )
    rows = [
        [row["id"], row["scenario"], row["variant"], row["question"], row["image"] is not None]
        for row in read_rows(output / "questions.jsonl")
    ]
    digest = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    return {"count": len(rows), "sha256": digest}
