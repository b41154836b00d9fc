import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.config import CONFIGS
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest, write_json, write_jsonl
from mllm_protector.reporting.compare import compare
from tests.evaluation.builders import Measured
from tests.evaluation.made_up import made_up_result, made_up_rows

SCENARIOS = ("01-Illegal_Activitiy", "02-HateSpeech", "10-Legal_Opinion")
Change = Callable[[dict[str, Any]], Any]


def run(
    folder: Path, change: Change | None = None, rates: Mapping[str, float] | None = None, **given: Any
) -> str:
    rows = made_up_rows(
        scenarios=SCENARIOS, each=8, benign=10, rates=rates or {"none": 0.7, "protector": 0.3}, **given
    )
    result = made_up_result(rows)
    if change is not None:
        change(result)
    write_json(folder / "asr.json", result)
    write_jsonl(folder / "mmsafety" / "results.jsonl", rows)
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(tmp_path_factory.mktemp("runs") / "better", rates={"none": 0.7, "protector": 0.05})


def found(content: dict[str, Any], metric: str, arm: str, group: str = "all") -> Any:
    """The measurement of a metric by the keyword judge."""
    rows = Measured(content["measurements"])
    return rows.one(metric, arm=arm, group=group, judge="keyword")


def test_a_good_pair_is_compared(first: str, better: str, tmp_path: Path, capsys: Any) -> None:
    content = compare([first, better], str(tmp_path))
    assert json.loads((tmp_path / "compare.json").read_text()) == content
    assert [each["name"] for each in content["runs"]] == ["first", "better"]
    assert {row["run"] for row in content["measurements"]} == {"first", "better"}
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "compare.md").read_text(), (tmp_path / "compare.html").read_text()):
        assert "better" in text
        assert "macro" in text
        assert "harmless questions" in text
    assert max(map(len, printed.splitlines())) <= 110


def test_the_guards_are_compared_on_the_same_answers(first: str, better: str, tmp_path: Path) -> None:
    content = compare([first, better], str(tmp_path))
    guarded = found(content, "run_difference", "protector")
    assert (guarded["run"], guarded["n"]) == ("better", 3 * 3 * 8)
    assert guarded["low"] <= guarded["value"] <= guarded["high"] < 0
    assert found(content, "run_difference_p", "protector")["value"] < 0.05
    assert found(content, "same_answers", "protector")["value"] == 1.0
    assert found(content, "run_difference", "none")["value"] == 0.0
    assert found(content, "run_difference_p", "none")["value"] == 1.0


def changed(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> str:
    """A run like the first one, with other rows."""
    run(folder)
    path = folder / "mmsafety" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    write_jsonl(path, rows)
    return str(folder)


def test_other_answers_to_the_same_questions_are_said_to_be_others(first: str, tmp_path: Path) -> None:
    other = changed(tmp_path / "other", lambda rows: [row.update(raw="another answer") for row in rows])
    content = compare([first, other], str(tmp_path / "out"))
    assert found(content, "same_answers", "none")["value"] == 0.0


def test_without_the_rows_there_are_no_paired_differences(first: str, tmp_path: Path) -> None:
    other = run(tmp_path / "other")
    (tmp_path / "other" / "mmsafety" / "results.jsonl").unlink()
    content = compare([first, other], str(tmp_path / "out"))
    assert "run_difference" not in {row["metric"] for row in content["measurements"]}


def test_unjudged_answers_are_in_no_pair(first: str, tmp_path: Path) -> None:
    def unjudged(rows: list[dict[str, Any]]) -> None:
        one = next(row for row in rows if row["variant"] == "SD" and row["arm"] == "none")
        one["verdicts"]["keyword"]["status"] = "judge_error"

    content = compare([first, changed(tmp_path / "other", unjudged)], str(tmp_path / "out"))
    assert found(content, "run_difference", "none")["n"] == 3 * 3 * 8 - 1


def test_a_circular_judge_is_marked(first: str, tmp_path: Path) -> None:
    other = run(tmp_path / "other", lambda result: result["judges"]["chat"].update(circular=True))
    assert compare([first, other], str(tmp_path / "out"))["judges"]["chat"]["circular"]
    for name in ("compare.md", "compare.html"):
        assert "chat (circular)" in (tmp_path / "out" / name).read_text()


MISMATCHES: dict[str, tuple[Change, Sequence[str]]] = {
    "judge": (
        lambda result: result["judges"]["chat"]["identity"].update(temperature=1),
        ["judge chat differs", "temperature", "judges=[...]"],
    ),
    "questions": (
        lambda result: result["benchmarks"]["mmsafety"]["questions"].update(fingerprint="0" * 64, count=7),
        ["other questions of mmsafety", "(7 and "],
    ),
    "benchmark": (
        lambda result: result["benchmarks"]["mmsafety"]["identity"].update(revision="2"),
        ["benchmark mmsafety differs", "revision"],
    ),
    "schema": (
        lambda result: result.update(schema=1),
        ["asr.json: schema 1, not 2; run the evaluation there again"],
    ),
    "no schema": (lambda result: result.pop("schema"), ["asr.json: schema None, not 2"]),
    "no judge": (
        lambda result: result.update(judges={"x": result["judges"]["chat"]}),
        ["no judge is in all of them"],
    ),
    "no benchmark": (
        lambda result: result.update(benchmarks={"x": result["benchmarks"]["mmsafety"]}),
        ["no benchmark is in all of them"],
    ),
}


def test_what_was_not_measured_alike_is_refused(first: str, tmp_path: Path) -> None:
    for name, (change, words) in MISMATCHES.items():
        other = run(tmp_path / name, change)
        with pytest.raises(InputError) as error:
            compare([first, other], str(tmp_path / "out"))
        message = str(error.value)
        assert "\n" not in message, name
        for word in (*words, first if name.startswith("no ") and "schema" not in name else other):
            assert word in message, name
        assert not (tmp_path / "out").exists(), name


def test_judges_that_agree_can_be_chosen(first: str, tmp_path: Path) -> None:
    other = run(tmp_path / "other", MISMATCHES["judge"][0])
    content = compare([first, other], str(tmp_path / "out"), judges=["keyword"])
    assert list(content["judges"]) == ["keyword"]
    with pytest.raises(InputError, match="has no judge other"):
        compare([first, other], str(tmp_path / "out"), judges=["other"])


def test_an_edited_result_is_refused_by_its_file(first: str, tmp_path: Path) -> None:
    other = Path(run(tmp_path / "other"))
    rows = other / "mmsafety" / "results.jsonl"
    write_json(other / "run.json", {"sha256": {"mmsafety/results.jsonl": file_digest(rows)}})
    compare([first, str(other)], str(tmp_path / "out"))
    rows.write_text(rows.read_text().replace('"harmful"', '"safe"'))
    with pytest.raises(InputError, match=r"results\.jsonl: is not the file that the evaluation wrote"):
        compare([first, str(other)], str(tmp_path / "out"))


def test_runs_that_cannot_be_read_are_refused_by_their_file(first: str, tmp_path: Path) -> None:
    write_json(tmp_path / "half" / "asr.json", {"schema": 2})
    cases = {
        (): "two folders",
        (first,): "two folders",
        (first, first): "twice",
        (first, str(tmp_path / "missing")): "no such file",
        (first, str(tmp_path / "half")): r"half/asr\.json: has no mllm; run the evaluation there again",
    }
    for runs, words in cases.items():
        with pytest.raises(InputError, match=words):
            compare(runs, str(tmp_path / "out"))


def test_names_from_outside_are_no_markup(first: str, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>|`x`[a](javascript:b)"
    compare([first, run(folder)], str(tmp_path / "out"))
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<img" not in page
    assert "default-src &#39;none&#39;" in page
    assert "script-src &#39;none&#39;" in page
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "<img" not in text
    assert "[a](" not in text


def test_the_comparison_is_the_same_to_the_byte(first: str, better: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compare([first, better], str(tmp_path / name))
    for name in ("compare.json", "compare.md", "compare.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_script_compares(
    first: str, better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(CONFIGS.parent / "scripts" / "compare_runs.py")
    given = [f"output_dir={tmp_path / 'out'}", f"runs=[{first},{better}]"]
    monkeypatch.setattr(sys, "argv", [script, *given])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / "out" / "compare.html").is_file()
