import errno
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.errors import RunError
from mllm_protector.training.checkpoints import Checkpoints

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def write(checkpoints: Checkpoints, step: int, size: int = 5, note: str = "") -> None:
    tensors = {
        "model": {"weight": torch.full((size, 3), float(step))},
        "optimizer": {
            "weight/exp_avg": torch.full((size, 3), -float(step)),
            "weight/step": torch.tensor(1.0),
        },
    }
    checkpoints.write(step, tensors, {"seen": step, "note": note})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest_step(folder: Path) -> int | None:
    found = Checkpoints(folder, keep_last=9).newest()
    return found and found.step


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.newest() is None
    write(checkpoints, 120)
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.state) == (120, {"seen": 120, "note": ""})
    assert found.folder.name == "step-00000120"
    assert names(found.folder) == sorted(FILES)
    assert torch.equal(found.tensors("model")["weight"], torch.full((5, 3), 120.0))
    assert found.tensors("optimizer")["weight/step"].shape == ()


def test_a_file_that_a_process_cannot_see_is_named(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path, 1), 1)
    found = Checkpoints(tmp_path, 1).newest()
    assert found is not None
    with pytest.raises(RunError, match=r"scheduler\.safetensors: cannot be read .* visible to every process"):
        found.tensors("scheduler")


def test_the_last_ones_are_kept_and_found_by_number_not_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (5, 99999999, 100000000):
        write(checkpoints, step)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert newest_step(tmp_path) == 100000000


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, note in ((1, "a"), (2, "b"), (2, "c"), (2, "d")):
        write(checkpoints, step, note=note)
        found = checkpoints.newest()
        assert found is not None
        assert found.state["note"] == note
    assert len(names(tmp_path)) == 2
    assert newest_step(tmp_path) == 2


def test_later_ones_of_an_abandoned_run_are_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (20, 30, 10):
        write(checkpoints, step)
    assert names(tmp_path) == ["step-00000010"]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_the_one_before_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    write(checkpoints, 1)
    write(checkpoints, 2)
    DAMAGES[damage](tmp_path / "step-00000002" / file)
    assert newest_step(tmp_path) == 1
    [warning] = caplog.messages
    assert "step-00000002: damaged" in warning
    assert file in warning


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path, 1), 2)
    path = tmp_path / "step-00000002" / "manifest.json"
    content = path.read_bytes()
    for position, byte in enumerate(content):
        for other in (byte ^ 1, byte ^ 0x20, 0x09):
            if other != byte:
                path.write_bytes(content[:position] + bytes([other]) + content[position + 1 :])
                with pytest.raises(RunError, match="no checkpoint is intact"):
                    newest_step(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"files": 1}', '{"files": {"a": 1}}', '{"files": {}}'])
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, content: str) -> None:
    write(Checkpoints(tmp_path, 1), 2)
    (tmp_path / "step-00000002" / "manifest.json").write_text(content)
    with pytest.raises(RunError, match="no checkpoint is intact"):
        newest_step(tmp_path)


def test_a_file_too_many_and_another_name_are_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        write(checkpoints, step)
    (tmp_path / "step-00000003" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    assert newest_step(tmp_path) == 1


def test_where_none_is_intact_the_run_does_not_start_over_silently(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path, 1), 1)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint is intact.*resume=never") as raised:
        newest_step(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_not_among_those_that_are_kept(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        write(Checkpoints(tmp_path, keep_last=2), step)
    DAMAGES[damage](tmp_path / "step-00000002" / "model.safetensors")
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.newest() is not None  # a resumed run has looked
    write(checkpoints, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_clear_removes_checkpoints_and_leftovers_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 1)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert names(tmp_path) == ["notes.txt"]
    Checkpoints(tmp_path / "none", keep_last=2).clear()


def test_what_cannot_be_cleared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 1)
    monkeypatch.setattr(Path, "rename", failing(errno.EBUSY))
    with pytest.raises(RunError, match="step-00000001: cannot be removed; remove it by hand"):
        checkpoints.clear()


def test_a_state_that_json_does_not_take_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Checkpoints(tmp_path / "none", 1).write(1, {}, {"loss": float("nan")})
    assert not (tmp_path / "none").exists()


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: a write beyond this fails (Python ignores the signal that would come too)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_gives_one_line_and_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 1)
    with (
        largest_file(4096),
        pytest.raises(RunError, match=re.escape(str(tmp_path)) + r".*step 2.*File too large") as raised,
    ):
        write(checkpoints, 2, size=1000)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_step(tmp_path) == 1
    write(checkpoints, 2, size=1000)
    assert newest_step(tmp_path) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename"])
def test_whatever_the_disk_refuses_is_one_line_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 1)
    with monkeypatch.context() as patched:
        patched.setattr(function, failing(number))
        with pytest.raises(RunError, match=os.strerror(number)):
            write(checkpoints, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_step(tmp_path) == 1


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/checkpoints: the checkpoint of step 1 cannot be written"):
        write(Checkpoints(tmp_path / "file" / "checkpoints", 1), 1)


EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Work in a child that gets a real SIGKILL before that file operation; false if it was done before."""
    child = os.fork()
    if child == 0:
        remaining = iter(range(event))

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            if name in EVENTS and next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_at_any_point_of_a_write_leaves_an_intact_checkpoint(
    tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    event, notes = 0, []
    while True:
        folder = tmp_path / str(event)
        write(Checkpoints(folder, keep_last=1), 1, note="old")
        killed = killed_at(event, lambda folder=folder: write(Checkpoints(folder, 1), step, note="new"))  # type: ignore[misc]
        found = Checkpoints(folder, keep_last=1).newest()
        assert found is not None
        notes.append(found.state["note"])
        write(Checkpoints(folder, keep_last=1), 3)
        assert names(folder) == ["step-00000003"]
        if not killed:
            break
        event += 1
    assert event > 20
    assert notes == sorted(notes, reverse=True)  # old ones, then new ones
    assert {"old", "new"} == set(notes[:-1])
    assert not caplog.messages


def test_the_manifest_says_what_the_files_are(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path, 1), 7)
    manifest = json.loads((tmp_path / "step-00000007" / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"]) == (1, 7)
    assert manifest["files"].keys() == set(FILES) - {"manifest.json"}
