import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data import table as module
from mllm_protector.data.table import (
    ABANDONED,
    BATCH,
    FACTS,
    ROWS,
    VARIABLE,
    Table,
    cache_folder,
    cached,
    code_digest,
    joined,
    open_table,
    record,
    records_table,
    write_facts,
    write_table,
)
from mllm_protector.errors import InputError, RunError
from mllm_protector.records import AnswerPair, LabelledAnswer

COUNT = 2 * BATCH + 5
PAIR = AnswerPair(query="q", accepted="a", rejected="r", accepted_harmful=True, scenario="Privacy")


def answer(number: int) -> LabelledAnswer:
    return LabelledAnswer(query=f"q{number}", answer="", harmful=number % 2 == 0, scenario=f"s{number % 3}")


def stored(folder: Path, records: list[Any]) -> Table[Any]:
    write_table(folder, iter(records))
    write_facts(folder, count=len(records))
    rows, facts = open_table(folder)
    assert facts["count"] == len(records)
    return Table(rows, record)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Table[Any]:
    return stored(tmp_path_factory.mktemp("table"), [answer(number) for number in range(COUNT)])


def test_records_come_back_as_they_were_from_the_disk_and_from_memory(tmp_path: Path) -> None:
    for number, records in enumerate(([PAIR], [answer(0)], [])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for table in (stored(folder, records), records_table(records)):
            assert list(table) == records
            assert [each.scenario for each in table] == [each.scenario for each in records]


@given(st.lists(st.integers(0, COUNT - 1), max_size=30))
def test_any_choice_of_rows_is_read_in_its_order(rows: Table[Any], numbers: list[int]) -> None:
    some = rows.take(np.array(numbers, np.int64))
    assert list(some) == list(map(answer, numbers)) == [some[at] for at in range(len(some))]


def test_a_table_is_a_sequence_whose_slices_are_tables(rows: Table[Any]) -> None:
    assert list(rows[BATCH - 1 : BATCH + 2]) == list(map(answer, range(BATCH - 1, BATCH + 2)))
    assert rows[-1] == answer(COUNT - 1)
    assert list(rows[1::2][3:5]) == [answer(7), answer(9)]
    with pytest.raises(IndexError):
        rows[COUNT]


def test_tables_of_pairs_and_of_answers_are_joined_in_their_order(rows: Table[Any]) -> None:
    both = joined([rows[5:8], records_table([PAIR]), records_table([]), rows[:1]])
    assert list(both) == [answer(5), answer(6), answer(7), PAIR, answer(0)]
    assert list(both.take(np.array([4, 3, 3, 0]))) == [answer(0), PAIR, PAIR, answer(5)]


def test_a_damaged_table_is_named_with_what_to_do(tmp_path: Path) -> None:
    def flipped(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    damages = {"cut": lambda content: content[:-1], "flipped": flipped, "emptied": lambda content: b""}
    for file in (ROWS, FACTS):
        for name, damage in (damages | {"gone": None}).items():
            folder = tmp_path / f"{file} {name}"
            folder.mkdir()
            stored(folder, [answer(number) for number in range(9)])
            path = folder / file
            path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
            if (file, name) in ((FACTS, "cut"), (FACTS, "flipped")):
                path.write_text(path.read_text(errors="replace")[:10])
            with pytest.raises(InputError, match=rf"{folder}: damaged .*; remove this folder, it will be"):
                open_table(folder)


# The cache


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def fill(folder: Path) -> None:
    (folder / "made").write_text("once")


def test_the_place_is_the_variable_or_else_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/mllm_protector")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mllm_protector"


def test_what_is_there_is_not_made_again(cache: Path) -> None:
    folder = cached("kind", "key", fill)
    assert folder == cache / "kind" / "key"
    assert cached("kind", "key", lambda _: pytest.fail("made again")) == folder
    assert (cached("kind", "other", fill) / "made").read_text() == "once"


def test_what_fails_leaves_nothing_behind(cache: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        cached("kind", "key", fail)
    assert list((cache / "kind").iterdir()) == []


def test_a_full_disk_is_one_line_that_names_the_way_out(cache: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=f"{VARIABLE}.*No space left on device"):
        cached("kind", "key", full)


def test_the_first_to_finish_wins(cache: Path) -> None:
    def slow(folder: Path) -> None:
        fill(folder)
        (cache / "kind" / "key").mkdir()
        (cache / "kind" / "key" / "made").write_text("by another process")

    assert (cached("kind", "key", slow) / "made").read_text() == "by another process"
    assert [path.name for path in (cache / "kind").iterdir()] == ["key"]


def test_only_what_a_killed_run_left_long_ago_is_removed(cache: Path) -> None:
    for name, age in (("old", ABANDONED + 60), ("young", 60)):
        folder = cache / "kind" / f".{name}.1.tmp"
        folder.mkdir(parents=True)
        fill(folder)
        for path in (folder / "made", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    cached("kind", "key", fill)
    assert sorted(path.name for path in (cache / "kind").iterdir()) == [".young.1.tmp", "key"]


def test_the_digest_of_code_is_that_of_its_source() -> None:
    assert code_digest(module) == code_digest(module) != code_digest(module, os)
