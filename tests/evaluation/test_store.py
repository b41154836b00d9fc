import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mllm_protector.errors import RecordError, RunError
from mllm_protector.evaluation.store import FAILED, Store, fill
from mllm_protector.files import content_key

ITEMS = list("abcde")
KEYS = {item: content_key(item) for item in [*ITEMS, *(f"{number:05}" for number in range(200))]}


def row(item: str, text: str = "words") -> dict[str, Any]:
    return {"key": KEYS[item], "item": item, "text": text}


def answer(items: Sequence[str]) -> list[dict[str, Any]]:
    return [{"item": item, "text": "words"} for item in items]


class Worker:
    """Answers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, items: Sequence[str]) -> list[dict[str, Any]]:
        self.asked.append(list(items))
        return answer(items)


def filled(
    folder: Path, items: Sequence[str], work: Any = answer, batch_size: int = 2, process: int = 0
) -> list[str]:
    """Fill, and give the items that a new store then finds finished."""
    wanted = [(KEYS[item], item) for item in items]
    fill(Store(folder, process), wanted, work, batch_size=batch_size, title="answers")
    return finished(folder)


def finished(folder: Path, process: int = 0) -> list[str]:
    store = Store(folder, process)
    return [item for item, key in KEYS.items() if key in store]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "answers"


def test_rows_come_back_as_they_were_written(folder: Path) -> None:
    rows = [row("a", "two\nlines\r\u2028 and ünïcödé" * 9000), row("b") | {"unsafe": None, "harm": 0.25}]
    store = Store(folder)
    store.append(rows)
    for each in (store, Store(folder), Store(folder, process=1)):
        assert [each.get(found["key"]) for found in rows] == rows
    assert (folder / "0.jsonl").read_bytes().count(b"\n") == 2
    assert "ünïcödé".encode() in (folder / "0.jsonl").read_bytes()
    assert store.get(KEYS["c"]) is None


def test_half_of_a_surrogate_pair_does_not_stop_a_run(folder: Path) -> None:
    Store(folder).append([row("a", "cut \ud83d")])
    assert Store(folder).get(KEYS["a"]) == row("a", "cut \ud83d")


def test_only_what_is_missing_is_computed_and_once(folder: Path) -> None:
    work = Worker()
    filled(folder, ["c", "a", "c"], work)
    assert filled(folder, ["a", "b", "b", "c", "d", "e"], work) == ITEMS
    assert work.asked == [["c", "a"], ["b", "d"], ["e"]]


def test_a_failure_is_kept_and_tried_again_by_the_next_run_only(folder: Path) -> None:
    asked: list[str] = []

    def failing(items: Sequence[str]) -> list[dict[str, Any]]:
        asked.extend(items)
        return [{"item": item, FAILED: "no answer"} for item in items]

    assert filled(folder, ["a", "b", "a"], failing) == []
    assert asked == ["a", "b"]
    found = Store(folder).get(KEYS["a"])
    assert found is not None
    assert found[FAILED] == "no answer"
    assert filled(folder, ["a"]) == ["a"]
    assert Store(folder).get(KEYS["a"]) == row("a")
    assert filled(folder, ["b"], failing) == ["a"]


def test_each_process_writes_its_own_file_and_reads_all(folder: Path) -> None:
    filled(folder, ["a", "b"], process=0)
    filled(folder, ["c"], process=1)
    assert sorted(path.name for path in folder.iterdir()) == ["0.jsonl", "1.jsonl"]
    for process in (0, 1, 2):
        assert finished(folder, process) == ["a", "b", "c"]
    work = Worker()
    filled(folder, ITEMS, work, process=5)
    assert work.asked == [["d", "e"]]


def test_what_another_process_has_not_finished_writing_is_not_touched(folder: Path) -> None:
    filled(folder, ["a", "b"], process=1)
    other = folder / "1.jsonl"
    torn = other.read_bytes()[:-3]
    other.write_bytes(torn)
    assert finished(folder, process=0) == ["a"]
    assert other.read_bytes() == torn
    assert finished(folder, process=1) == ["a"]
    assert len(other.read_bytes().splitlines()) == 1


def test_a_failure_in_one_file_does_not_hide_the_result_in_another(folder: Path) -> None:
    Store(folder, 0).append([row("a") | {FAILED: "no answer"}])
    Store(folder, 1).append([row("a")])
    assert Store(folder, 0).get(KEYS["a"]) == Store(folder, 1).get(KEYS["a"]) == row("a")
    assert Store(folder, 2).get(KEYS["a"]) == row("a")


def test_each_batch_is_stored_before_the_next_begins(folder: Path) -> None:
    def interrupted(items: Sequence[str]) -> list[dict[str, Any]]:
        if "c" in items:
            raise KeyboardInterrupt
        return answer(items)

    with pytest.raises(KeyboardInterrupt):
        filled(folder, ["a", "b", "c"], interrupted)
    assert finished(folder) == ["a", "b"]
    assert filled(folder, ["a", "b", "c"]) == ["a", "b", "c"]


def test_a_wrong_number_of_rows_is_refused_and_not_stored(folder: Path) -> None:
    for wrong in (["a"], ["a", "b", "c"]):
        with pytest.raises(RuntimeError, match="were asked for"):
            filled(folder, ["a", "b"], lambda _, made=wrong: answer(made))
        assert finished(folder) == []


def test_a_stored_row_is_never_written_again(folder: Path) -> None:
    store = Store(folder)
    store.append([row("a")])
    with pytest.raises(RuntimeError, match="stored already"):
        store.append([row("b"), row("a")])
    assert finished(folder) == ["a"]


def test_a_torn_tail_is_cut_off(folder: Path) -> None:
    filled(folder, ["a", "b"])
    path = folder / "0.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"key": "c", "te', b'{"key": "c"}', b"\xc3", b"\0" * 50):
        path.write_bytes(whole + torn)
        assert finished(folder) == ["a", "b"], torn
        assert path.read_bytes() == whole, torn
    assert filled(folder, ["a", "b", "c"]) == ["a", "b", "c"]


def test_a_broken_line_is_named(folder: Path) -> None:
    filled(folder, ["a", "b"])
    path = folder / "0.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    for line, reason in (
        (b"{broken\n", "not valid JSON"),
        (b"\n", "not valid JSON"),
        (b"[1]\n", "must be a JSON object"),
        (b'{"text": "x"}\n', "missing field 'key'"),
        (b'{"key": 5}\n', "must be a text"),
        (b'{"key": "no hash"}\n', "hex"),
        (b'{"key": "\xff"}\n', "not UTF-8"),
        (json.dumps({"key": KEYS["a"]}).encode() + b"\n", f"second row with the key '{KEYS['a']}'"),
    ):
        path.write_bytes(first + line + second)
        with pytest.raises(RecordError, match=rf"^{re.escape(str(path))}:2: .*{re.escape(reason)}"):
            Store(folder)


def test_short_writes_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = os.write
    monkeypatch.setattr(
        "mllm_protector.evaluation.store.os.write", lambda file, data: whole_write(file, bytes(data[:7]))
    )
    filled(folder, ["a", "b", "c"])
    monkeypatch.undo()
    store = Store(folder)
    assert [store.get(KEYS[item]) for item in "abc"] == [row(item) for item in "abc"]


def _full_disk(file: int, data: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(folder, ["a", "b"])
    path = folder / "0.jsonl"
    room = [20]
    whole_write = os.write

    def nearly_full(file: int, data: Any) -> int:
        if not room[0]:
            return _full_disk(file, data)
        written = whole_write(file, bytes(data[: room[0]]))
        room[0] -= written
        return written

    monkeypatch.setattr("mllm_protector.evaluation.store.os.write", nearly_full)
    with pytest.raises(RunError, match=rf"^{re.escape(str(path))}: .*No space left on device.*again$"):
        filled(folder, ["a", "b", "c", "d"])
    monkeypatch.undo()
    assert not path.read_bytes().endswith(b"\n")
    assert finished(folder) == ["a", "b"]
    assert filled(folder, ["a", "b", "c", "d"]) == ["a", "b", "c", "d"]


def test_a_second_writer_is_noticed(folder: Path) -> None:
    first, second = Store(folder), Store(folder)
    first.append([row("a")])
    with pytest.raises(RunError, match="stop the other run"):
        second.append([row("b")])
    first.append([row("b")])
    assert finished(folder) == ["a", "b"]


def test_the_log_says_what_was_new_and_what_failed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    filled(folder, ["a", "b"])
    filled(folder, ["a", "b", "c"])
    filled(folder, ["a", "b", "c"])
    filled(folder, ["d"], lambda items: [{FAILED: "no"} for _ in items])
    first, second, third, _, fourth = caplog.messages
    assert re.fullmatch(r"answers: 2 rows, 0 already there, 2 new in \S+ s \(\S+/s\)", first)
    assert second.startswith("answers: 3 rows, 2 already there, 1 new in ")
    assert third == "answers: 3 rows, 3 already there"
    assert fourth.endswith("; 1 failed (1 x no), the same command tries them again")


def test_the_first_failure_of_a_kind_is_told_at_once_and_all_are_counted_at_the_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reasons = {"a": "/data/1.png: not an image", "b": "/data/2.png: not an image", "c": "HTTP 400", "d": None}

    def work(items: Sequence[str]) -> list[dict[str, Any]]:
        return [{"question": item} | ({FAILED: reasons[item]} if reasons[item] else {}) for item in items]

    filled(folder, [*reasons], work)
    *told, summary = caplog.messages
    assert told == ["answers: a: /data/1.png: not an image", "answers: c: HTTP 400"]
    assert summary.endswith("; 3 failed (2 x not an image; 1 x HTTP 400), the same command tries them again")


CHILD = """
import os, sys, time
from pathlib import Path
from mllm_protector.evaluation.store import Store, fill
from mllm_protector.files import content_key

whole_write = os.write

def slow_write(file, data):  # so that a kill lands inside a line
    time.sleep(0.001)
    return whole_write(file, bytes(data[:1000]))

def work(items):
    return [{"item": item, "text": item * 1000} for item in items]

store = Store(Path(sys.argv[1]))
os.write = slow_write
print("ready", flush=True)
items = [f"{number:05}" for number in range(200)]
fill(store, [(content_key(item), item) for item in items], work, batch_size=4, title="answers")
"""


def test_ten_kills_lose_nothing_repeat_nothing_and_leave_no_torn_line(folder: Path) -> None:
    dice = random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder)]
    path = folder / "0.jsonl"
    torn = 0
    for _ in range(10):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0.0, 0.08))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        torn += path.exists() and not path.read_bytes().endswith(b"\n")
    assert torn > 0  # otherwise this test proves nothing
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [found["item"] for found in rows] == [f"{number:05}" for number in range(200)]
    assert all(found["text"] == found["item"] * 1000 for found in rows)
