import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_protector.errors import RunError
from mllm_protector.training.checkpoints import Checkpoints
from tests.cases import case

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def write(folder: Path, *steps: int, keep_last: int = 2, note: str = "") -> Checkpoints:
    """As a training does that resumes from the newest checkpoint, if there is one."""
    checkpoints = Checkpoints(folder, keep_last)
    checkpoints.newest()
    for step in steps:
        tensors = {
            "model": {"weight": torch.full((5, 3), float(step))},
            "optimizer": {"weight/exp_avg": torch.full((5, 3), -1.0), "weight/step": torch.tensor(1.0)},
        }
        checkpoints.write(step, tensors, {"seen": step, "note": note})
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest_step(folder: Path) -> int | None:
    found = Checkpoints(folder, keep_last=9).newest()
    return found and found.step


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", 2).newest() is None
    found = write(tmp_path / "checkpoints", 120).newest()
    assert found is not None
    assert (found.step, found.state) == (120, {"seen": 120, "note": ""})
    assert found.folder.name == "step-00000120"
    assert names(found.folder) == sorted(FILES)
    assert torch.equal(found.tensors("model")["weight"], torch.full((5, 3), 120.0))
    assert found.tensors("optimizer")["weight/step"].shape == ()
    with pytest.raises(RunError, match=r"scheduler\.safetensors: cannot be read .* visible to every process"):
        found.tensors("scheduler")


def test_the_last_ones_are_kept_and_found_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 5, 99999999, 100000000)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert newest_step(tmp_path) == 100000000


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
    "one more": lambda path: path.with_name("notes.txt").write_text("mine"),
    "renamed": lambda path: path.parent.rename(path.parent.with_name("step-00000009")),
}


def test_a_damaged_checkpoint_is_passed_over_and_replaced_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for damage, act in DAMAGES.items():
        for file in FILES:
            with case(damage, file):
                folder = tmp_path / damage / file
                write(folder, 1, 2)
                act(folder / "step-00000002" / file)
                caplog.clear()
                assert newest_step(folder) == 1
                [warning] = caplog.messages
                assert ": damaged (" in warning
                if damage in ("empty", "half", "flipped") and file != "manifest.json":
                    assert f"{file}: not as written" in warning
                write(folder, 3, keep_last=3)
                assert names(folder) == ["step-00000001", "step-00000003"]


def test_where_none_is_intact_the_run_does_not_start_over_silently(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint is intact.*resume=never") as raised:
        newest_step(tmp_path)
    assert "\n" not in str(raised.value)


def test_clear_removes_checkpoints_and_leftovers_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = write(tmp_path, 1)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing(errno.EBUSY))
        with pytest.raises(RunError, match="step-00000001: cannot be removed; remove it by hand"):
            checkpoints.clear()
    checkpoints.clear()
    assert names(tmp_path) == ["notes.txt"]
    Checkpoints(tmp_path / "none", keep_last=2).clear()


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_write_that_the_disk_refuses_is_one_line_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, keep_last=1)
    for function in ("os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename"):
        for number in (errno.ENOSPC, errno.EROFS):
            with case(function, number):
                with monkeypatch.context() as patched:
                    patched.setattr(function, failing(number))
                    with pytest.raises(RunError, match=os.strerror(number)) as raised:
                        write(tmp_path, 2, keep_last=1)
                assert "\n" not in str(raised.value)
                assert names(tmp_path) == ["step-00000001"]
                assert newest_step(tmp_path) == 1


EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def killed_at(event: int, work: Callable[[], object]) -> bool:
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


def test_a_kill_at_any_point_of_a_write_leaves_an_intact_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event, notes, killed = 0, [], True
    while killed:
        folder = tmp_path / str(event)
        write(folder, 1, note="old")
        killed = killed_at(event, lambda folder=folder: write(folder, 2, keep_last=1, note="new"))  # type: ignore[misc]
        found = Checkpoints(folder, keep_last=1).newest()
        assert found is not None
        notes.append(found.state["note"])
        write(folder, 3, keep_last=1)
        assert names(folder) == ["step-00000003"]
        event += 1
    assert event > 20
    assert notes == sorted(notes, reverse=True)  # old ones, then new ones
    assert {"old", "new"} == set(notes[:-1])
    assert not caplog.messages
