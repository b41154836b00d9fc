import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_protector.data import table
from mllm_protector.data.table import ABANDONED, VARIABLE, cache_folder, cached, code_digest
from mllm_protector.errors import InputError, RunError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))


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


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = cached("kind", "key", fill)
    assert folder == tmp_path / "kind" / "key"
    assert cached("kind", "key", lambda _: pytest.fail("made again")) == folder
    assert (cached("kind", "other", fill) / "made").read_text() == "once"


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        cached("kind", "key", fail)
    assert list((tmp_path / "kind").iterdir()) == []


def test_a_full_disk_is_one_line_that_names_the_way_out() -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=f"{VARIABLE}.*No space left on device"):
        cached("kind", "key", full)


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        fill(folder)
        (tmp_path / "kind" / "key").mkdir()
        (tmp_path / "kind" / "key" / "made").write_text("by another process")

    assert (cached("kind", "key", slow) / "made").read_text() == "by another process"
    assert [path.name for path in (tmp_path / "kind").iterdir()] == ["key"]


def test_only_what_a_killed_run_left_long_ago_is_removed(tmp_path: Path) -> None:
    for name, age in (("old", ABANDONED + 60), ("young", 60)):
        folder = tmp_path / "kind" / f".{name}.1.tmp"
        folder.mkdir(parents=True)
        fill(folder)
        for path in (folder / "made", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    cached("kind", "key", fill)
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == [".young.1.tmp", "key"]


def test_a_folder_that_another_process_finishes_meanwhile_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    going = tmp_path / "kind" / ".other.1.tmp"
    going.mkdir(parents=True)
    listed = Path.iterdir

    def finished(self: Path) -> Iterator[Path]:
        if self == going:
            going.rename(tmp_path / "kind" / "other")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", finished)
    assert (cached("kind", "key", fill) / "made").exists()


def test_the_digest_of_code_is_that_of_its_source() -> None:
    assert code_digest(table) == code_digest(table) != code_digest(table, os)
