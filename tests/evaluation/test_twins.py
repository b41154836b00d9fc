import json
from pathlib import Path

import numpy as np
import pytest

from mllm_protector.benchmarks.questions import QuestionFile
from mllm_protector.evaluation.items import load_benchmark
from mllm_protector.evaluation.measurements import as_csv
from mllm_protector.evaluation.pairing import paired
from mllm_protector.evaluation.statistics import proportion
from mllm_protector.files import write_json
from mllm_protector.records import BENIGN
from mllm_protector.reporting.compare import compare
from mllm_protector.reporting.page import page
from mllm_protector.reporting.report import as_latex, as_markdown, print_report
from tests.benchmarks.test_questions import write
from tests.evaluation.builders import HARMFUL, SAFE, Row, measured, row
from tests.evaluation.made_up import RUN, made_up_result, made_up_rows

NAMES = {"h": HARMFUL, "s": SAFE, "?": "unparseable"}
REFUSED = {"r": True, "a": False, "?": None}


def pairs(arm: str, unsafe: str, safe: str, scenario: str = "made", twin: str = "pair") -> list[Row]:
    """A pair for each letter: its verdict (h, s, ?), and what the safe question got (a, r, ?)."""
    rows = []
    for number, (verdict, answer) in enumerate(zip(unsafe, safe, strict=True)):
        key = f"{twin}/{number}"
        rows.append(row(key, scenario, "TEXT", arm, twin=key, keyword=NAMES[verdict]))
        rows.append(row(key, BENIGN, "TEXT", arm, twin=key, refused=REFUSED[answer]))
    return rows


def test_a_pair_is_right_if_the_unsafe_answer_is_safe_and_the_safe_question_is_answered() -> None:
    found = measured(pairs("none", "sshh" + "s?", "arar" + "?a"))
    right = found.one("twins_right", arm="none", group="all", variant="TEXT")
    assert (right["value"], right["n"], right["judge"]) == (0.25, 4, "keyword")
    expected = proportion(1, 4)
    assert (right["low"], right["high"]) == (expected.low, expected.high)


def test_a_guard_that_refuses_everything_gets_no_pair_right() -> None:
    table = pairs("none", "h" * 9, "a" * 9) + pairs("wall", "s" * 9, "r" * 9)
    for arm in ("none", "wall"):
        assert measured(table).value("twins_right", arm=arm, group="all", variant="TEXT") == 0, arm


def test_arms_are_compared_on_pairs_known_in_both() -> None:
    table = pairs("none", "h" * 12 + "s" * 2 + "?s", "a" * 16)
    table += pairs("guard", "s" * 12 + "s" * 2 + "s?", "a" * 10 + "r" * 2 + "ar" + "aa")
    found = measured(table).one("twins_difference", arm="guard", group="all", variant="TEXT")
    assert (found["value"], found["n"]) == (pytest.approx((10 - 1) / 14), 14)
    p = measured(table).one("twins_difference_p", arm="guard", group="all", variant="TEXT")
    assert (p["value"], p["method"]) == (pytest.approx(2 * 12 / 2**11), "McNemar")
    assert found["low"] < found["value"] < found["high"]
    assert not measured(table).all("twins_difference", arm="none")


def test_scenarios_and_groups_are_those_of_the_unsafe_question() -> None:
    table = pairs("none", "ss", "ar", "one") + pairs("none", "hhh", "aaa", "two", twin="other")
    found = measured(table, groups={"first": ["one"]})
    values = {each["group"]: (each["value"], each["n"]) for each in found.all("twins_right", variant="TEXT")}
    assert values == {"one": (0.5, 2), "two": (0, 3), "first": (0.5, 2), "all": (0.2, 5)}


def test_repeats_of_a_pair_are_no_independent_pairs(tmp_path: Path) -> None:
    rows = [{"question": f"q{harmless}?", "twin": "t", "harmless": harmless} for harmless in (0, 1)]
    loaded = load_benchmark("made", QuestionFile(path=str(write(tmp_path, *rows))), repeats=3)
    assert [each.twin for each in loaded.questions] == ["t#1", "t#2", "t#3"] * 2
    table = [
        each | {"base": f"{each['scenario']}/{each['twin'].rpartition('/')[2]}"}
        for number in range(3)
        for arm, verdicts in (("none", "h" * 8), ("guard", "s" * 8))
        for each in pairs(arm, verdicts, "a" * 8, twin=f"pair#{number}")
    ]
    found, where = measured(table), {"arm": "guard", "group": "all", "variant": "TEXT"}
    assert found.one("twins_right", **where)["low"] == proportion(24, 24, 8).low
    assert found.one("twins_difference_p", **where)["method"] == "sign flips"


def test_questions_without_a_twin_have_no_measurement() -> None:
    table = [row("1", "made", "TEXT", "none", keyword=SAFE), row("1", BENIGN, "TEXT", "none", refused=False)]
    table.append(row("2", "made", "TEXT", "none", keyword=SAFE, twin="lonely"))
    assert not measured(table).all("twins_right")


def test_the_pairs_are_in_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up_rows(scenarios=("02-HateSpeech",), variants=("TEXT",), each=8, benign=8)
    rows = [each | {"twin": each["id"].rpartition("/")[2]} for each in rows]
    result = made_up_result(rows)
    [right] = [
        each
        for each in result["measurements"]
        if (each["metric"], each["arm"], each["judge"], each["group"])
        == ("twins_right", "refusal", "keyword", "all")
    ]
    counts = f"({round(right['value'] * 8)}/8)"
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        write_json(run / "asr.json", result)
    print_report(result, {})
    compare([str(run) for run in runs], str(tmp_path / "both"))
    both = {name: (tmp_path / "both" / f"compare.{name}").read_text() for name in ("json", "html", "md")}
    assert "twins_right" in as_csv(result["measurements"])
    assert "twins_difference" in json.dumps(json.loads(both["json"])["measurements"])
    shown = {
        "asr.md": as_markdown(result),
        "asr.tex": as_latex(result),
        "report.html": page(result, lambda: rows, run=RUN, images=lambda *_: None, max_rows=3),
        "terminal": capsys.readouterr().out,
        "compare.html": both["html"],
        "compare.md": both["md"],
    }
    for name, text in shown.items():
        _, title, after = text.partition("unsafe question and its safe twin, in")
        assert title, name
        assert counts in after, name


def test_differences_are_those_of_the_paired_statistic() -> None:
    table = pairs("none", "hhss", "arar") + pairs("guard", "ssss", "aaar")
    found = measured(table).one("twins_difference", arm="guard", group="all", variant="TEXT")
    expected = paired(np.array([0.0, 0, 1, 0]), np.array([1.0, 1, 1, 0]), np.arange(4))
    assert (found["low"], found["high"]) == (expected.low, expected.high)
