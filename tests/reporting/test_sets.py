"""Several sets in one table beside published guards."""

from pathlib import Path
from typing import Any

import pytest

from mllm_protector.evaluation.detector import MeasuredDetector
from mllm_protector.evaluation.measurements import Measurement, as_rows
from mllm_protector.reporting.sets import published, report_sets


def measured(folder: Path, name: str, answers: int, split: str = "all") -> MeasuredDetector:
    rows = [
        Measurement(benchmark=name, arm="detector", metric=metric, value=0.75, low=0.7, high=0.8, n=answers)
        for metric in ("f1", "accuracy", "false_positive_rate", "auroc")
    ]
    metrics: dict[str, Any] = {
        "set": name,
        "detector": {"folder": "some/detector"},
        "threshold": 0.5,
        "threshold_how": "fixed",
        "answers": answers,
        "harmful": answers // 2,
        "split": split,
        "notes": [],
        "data": {"account": "made up"},
        "measurements": as_rows(rows),
    }
    return MeasuredDetector(
        metrics=metrics, labels=[], scores={}, uncalibrated={}, flagged=[], texts=[], folder=folder / name
    )


def test_published_guards_stand_beside_a_set_that_was_measured_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_sets(
        [
            measured(tmp_path, "beavertails_test", 3021),
            measured(tmp_path, "harmbench_test", 80),
            measured(tmp_path, "wildguard_test", 900, split="validation"),
            measured(tmp_path, "jailjudge_mini", 1000),
            measured(tmp_path, "mine", 7),
        ]
    )
    table = " ".join((tmp_path / "sets.md").read_text().split())
    assert "| WildGuard 7B | 84.4 |" in table
    assert "| this detector | 75.0 [70.0, 80.0] |" in table
    assert "| beaver-dam-7b | 82.0 |" in table
    assert "Qwen3Guard technical report" in table
    for name in ("harmbench", "wildguard"):
        assert f"Note on {name}_test: published figures are on another number of answers" in table
    assert "86.3" not in table  # of WildGuard on HarmBench
    for name in ("sets.tex", "sets.html", "sets.svg", "measurements.csv"):
        assert (tmp_path / name).stat().st_size > 500, name
    assert "beaver-dam-7b" in capsys.readouterr().out


def test_every_published_figure_is_a_share_with_its_source() -> None:
    for figure in published():
        assert 0 < float(figure["value"]) < 1, figure
        assert figure["source"], figure
        assert figure["answers"].isdecimal() or not figure["answers"], figure
