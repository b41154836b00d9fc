import csv
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.benchmarks.xstest import CONTRAST, XSTest
from mllm_protector.errors import InputError
from mllm_protector.records import BENIGN, LoadedBenchmark
from mllm_protector.scenarios import Criterion

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "xstest"
SAFE = [(f"v2-{number}", "homonyms", f"safe {number}") for number in range(20)]
UNSAFE = [(f"v2-{number}", "contrast_homonyms", f"unsafe {number}") for number in range(20, 30)]


def write(
    path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("id", "type", "prompt")
) -> Path:
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([columns, *rows])
    return path


def load(path: Path, **settings: Any) -> LoadedBenchmark:
    return XSTest(path=str(path), **settings).load()


def test_the_published_completion_files_hold_each_prompt_once() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"no XSTest in {PUBLISHED}")
    questions = load(PUBLISHED).questions
    assert len({question.id for question in questions}) == len(questions) == 324
    one_file = load(PUBLISHED / "xstest_v2_completions_gpt4.csv").questions
    assert one_file == questions
    safe = [question for question in questions if question.scenario == BENIGN]
    assert questions[: len(safe)] == safe
    assert "Python process" in safe[0].text


def test_safe_prompts_are_harmless_and_their_counterparts_are_judged_for_harm(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "prompts.csv", [*UNSAFE[:1], *SAFE[:1]]))
    safe, unsafe = loaded.questions
    assert (safe.id, safe.scenario, safe.text, safe.variant) == ("v2-0", BENIGN, "safe 0", "TEXT")
    assert (unsafe.scenario, unsafe.criterion) == (CONTRAST, Criterion.HARM)
    assert loaded.missing == []


def test_limit_draws_from_both_sides_and_keeps_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.csv", [*SAFE, *UNSAFE])
    whole, part = load(path).questions, load(path, limit=4).questions
    assert [question.scenario for question in part] == [BENIGN] * 4 + [CONTRAST] * 4
    assert all(question in whole for question in part)
    assert part != load(path, limit=4, seed=1).questions


def test_one_id_with_two_prompts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [("1", "homonyms", "one")])
    write(tmp_path / "b.csv", [("1", "homonyms", "two")])
    with pytest.raises(InputError, match=r"b\.csv: id 1 has another prompt or type than in .*a\.csv"):
        load(tmp_path)


def test_a_broken_row_or_file_is_named(tmp_path: Path) -> None:
    columns = ("id", "type", "prompt")
    cases: list[tuple[list[tuple[str, ...]], str]] = [
        ([columns, ("1", "homonyms", "")], "x.csv:2: field 'prompt' is empty"),
        ([columns, ("1", "", "p")], "x.csv:2: field 'type' is empty"),
        ([columns, ("i" * 300, "homonyms", "p")], "x.csv:2: field 'id' must be one printable line"),
        ([columns, ("1", "homonyms", "p"), ("1", "homonyms", "p")], "x.csv:3: duplicate of line 2"),
        ([columns], "the file is empty"),
        ([("id", "prompt"), ("1", "p")], "missing field 'type'"),
    ]
    for (header, *rows), message in cases:
        with pytest.raises(InputError, match=message):
            load(write(tmp_path / "x.csv", rows, header))
    with pytest.raises(InputError, match=r"gone\.csv: no such file"):
        load(tmp_path / "gone.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^path=.*empty: holds no CSV file"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"^limit must be at least 1"):
        XSTest(path="x", limit=0)


def test_the_identity_is_that_of_the_files_and_not_of_the_selection(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", SAFE)
    before = XSTest(path=str(path)).card.identity
    assert before == XSTest(path=str(path), limit=1, seed=4).card.identity
    in_folder = XSTest(path=str(tmp_path)).card.identity
    write(path, UNSAFE)
    assert XSTest(path=str(path)).card.identity != before
    assert XSTest(path=str(tmp_path)).card.identity != in_folder
