"""The files that people read, made from measurements alone."""

import csv
import io
import json
from typing import Any

import pytest
from PIL import Image

from mllm_protector.evaluation.measurements import FIELDS, as_csv
from mllm_protector.reporting import columns, pivots
from mllm_protector.reporting.page import page
from mllm_protector.reporting.plots import asr_plot, plots
from mllm_protector.reporting.report import as_latex, as_markdown, print_report
from tests.evaluation.made_up import RUN, made_up_result, made_up_rows

SCENARIOS = ("01-Illegal_Activitiy", "02-HateSpeech", "10-Legal_Opinion")
HOSTILE = "<b>|`x`[a](javascript:b)\\input{x}$^~%\u202e\x1b[0m"


def rows(**given: Any) -> list[dict[str, Any]]:
    return made_up_rows(**{"scenarios": SCENARIOS, "each": 4, "benign": 6} | given)


def html(result: dict[str, Any], some: list[dict[str, Any]]) -> str:
    return page(result, lambda: some, run=RUN, images=lambda *_: None, max_rows=3)


def test_every_metric_but_the_named_ones_has_a_table() -> None:
    result = made_up_result(rows())
    data = pivots.pivot(result, "mmsafety")
    text = "".join(" ".join(table.header) for table in pivots.tables(data))
    for heading in ("macro", "pooled", "difference", "changed", "allowed", "agree", "with image"):
        assert heading in text, heading
    assert {row["metric"] for row in result["measurements"]} <= columns.KNOWN


def test_every_file_is_the_same_to_the_byte_each_time() -> None:
    result = made_up_result(rows())
    for make in (as_markdown, as_latex, asr_plot):
        assert make(result) == make(json.loads(json.dumps(result))), make


def test_the_plots_are_whole_and_the_page_has_them() -> None:
    result = made_up_result(rows())
    with Image.open(io.BytesIO(asr_plot(result))) as chart:
        assert chart.width > 300
    data = pivots.pivot(result, "mmsafety")
    found = plots(data, "mmsafety", {"protector": 0.5})
    assert len(found) == 3
    assert html(result, rows()).count("data:image/svg+xml") == 3
    assert all(b"</svg>" in content for content in found.values())


def test_nothing_to_count_still_makes_every_file() -> None:
    result = made_up_result(rows()) | {"measurements": []}
    result["benchmarks"]["mmsafety"]["groups"] = {"all": []}
    assert "Nothing was judged." in as_markdown(result)
    assert "booktabs" in as_latex(result)
    assert asr_plot(result)
    assert as_csv([]) == ",".join(FIELDS) + "\r\n"


def test_csv_has_every_measurement_and_never_starts_a_formula() -> None:
    result = made_up_result(rows())
    written = list(csv.DictReader(io.StringIO(as_csv(result["measurements"]), newline="")))
    assert [*written[0]] == list(FIELDS)
    assert len(written) == len(result["measurements"])
    for own, row in zip(result["measurements"], written, strict=True):
        assert (row["value"] == "") == (own["value"] is None)
        assert own["value"] is None or float(row["value"]) == own["value"]
    for start in ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"):
        name = f"{start}HYPERLINK(1)"
        row = {**dict.fromkeys(FIELDS), "metric": "asr", "judge": name, "value": -0.5}
        [found] = csv.DictReader(io.StringIO(as_csv([row]), newline=""))
        assert (found["judge"], found["value"]) == (f"'{name}", "-0.5"), start


def hostile() -> dict[str, Any]:
    some = rows(judges=("keyword", HOSTILE))
    for row in some:
        row["scenario"] = HOSTILE if row["scenario"] == SCENARIOS[0] else row["scenario"]
    return made_up_result(some, notes=[HOSTILE])


def test_names_from_outside_are_no_markup_in_markdown() -> None:
    text = as_markdown(hostile())
    assert "<b>" not in text
    assert "[a](" not in text
    assert "\u202e" not in text
    rows_of = [line for line in text.splitlines() if line.startswith("|") and "javascript" in line]
    assert rows_of
    assert all("\\|" in line for line in rows_of)


def test_names_from_outside_are_no_commands_in_latex() -> None:
    text = as_latex(hostile())
    assert text.isascii()
    assert not [line for line in text.splitlines() if "\\input" in line and not line.startswith("%")]
    commands = [line for line in text.splitlines() if "javascript" in line and not line.startswith("%")]
    assert commands
    for line in commands:
        assert line.replace("\\$", "").count("$") == 0, line
        assert line.replace("\\%", "").count("%") == 0, line


def test_the_terminal_shows_no_control_characters_and_at_most_110_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(hostile(), {})
    printed = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(printed)
    assert max(map(len, printed.splitlines())) <= 110
    assert "Harmless questions" in printed


def test_a_circular_judge_is_marked_wherever_its_numbers_stand(capsys: pytest.CaptureFixture[str]) -> None:
    result = made_up_result(rows(judges=("keyword",)))
    result["judges"]["keyword"] |= {"circular": True, "note": "Circular: it is the guard's own."}
    print_report(result, {})
    for name, text in {
        "asr.md": as_markdown(result),
        "asr.tex": as_latex(result),
        "report.html": html(result, rows(judges=("keyword",))),
        "terminal": capsys.readouterr().out,
    }.items():
        assert "keyword (circular)" in text, name
        assert "Circular: it is the guard" in text, name
