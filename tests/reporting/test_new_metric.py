"""An exercise: a new metric is one function in one list, and every file and page shows it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_protector.evaluation.grid import Answers
from mllm_protector.evaluation.measurements import Measurement, as_csv
from mllm_protector.evaluation.summary import STATISTICS
from mllm_protector.files import write_json
from mllm_protector.reporting.compare import compare
from mllm_protector.reporting.page import page
from mllm_protector.reporting.report import as_markdown, print_report
from tests.evaluation.made_up import RUN, made_up_result, made_up_rows

SCENARIOS = ("01-Illegal_Activitiy", "10-Legal_Opinion")


def share_of_owls(answers: Answers) -> Iterator[Measurement]:
    yield Measurement(arm="protector", metric="share_of_owls", value=0.375, low=0.25, high=0.5, n=8)


def test_a_new_metric_is_one_function_and_is_in_json_csv_html_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mllm_protector.evaluation.summary.STATISTICS", [*STATISTICS, share_of_owls])
    rows = made_up_rows(scenarios=SCENARIOS, each=2, benign=2)
    result = made_up_result(rows)
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        write_json(run / "asr.json", result)
    print_report(result, {})
    compare([str(run) for run in runs], str(tmp_path / "both"))
    both = {name: (tmp_path / "both" / f"compare.{name}").read_text() for name in ("json", "html", "md")}
    shown = {
        "asr.json": (runs[0] / "asr.json").read_text(),
        "measurements.csv": as_csv(result["measurements"]),
        "asr.md": as_markdown(result),
        "report.html": page(result, lambda: rows, run=RUN, images=lambda *_: None, max_rows=3),
        "terminal": capsys.readouterr().out,
        **both,
    }
    for name, text in shown.items():
        assert "share_of_owls" in text, name
        assert "0.375" in text, name
    [row] = [row for row in result["measurements"] if row["metric"] == "share_of_owls"]
    compared = [row for row in json.loads(both["json"])["measurements"] if row["metric"] == "share_of_owls"]
    assert compared == [{"run": name, **row} for name in ("one", "two")]
