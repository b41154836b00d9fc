"""Runs that want the same folder at once."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mllm_protector.errors import InputError
from mllm_protector.locks import LOCK, locked


@contextmanager
def another_run(folder: Path) -> Iterator[int]:
    """A process that holds the folder until it is left or killed; its number."""
    ready, say_ready = os.pipe()
    wait, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        with locked(folder, "output_dir"):
            os.write(say_ready, b"!")
            os.read(wait, 1)
        os._exit(0)
    assert os.read(ready, 1) == b"!"
    yield child
    os.close(release)
    os.waitpid(child, 0)
    for each in (ready, say_ready, wait):
        os.close(each)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused, locked(folder, "output_dir"):
        raise AssertionError("two runs in one folder")
    return str(refused.value)


def test_a_second_run_is_refused_with_host_and_process_until_the_first_one_ends(tmp_path: Path) -> None:
    with another_run(tmp_path) as number:
        assert refusal(tmp_path) == (
            f"output_dir={tmp_path}: another run writes there (host {socket.gethostname()}, process "
            f"{number}); wait for it or choose another output_dir"
        )
    with locked(tmp_path, "output_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    with another_run(tmp_path) as number:
        os.kill(number, signal.SIGKILL)
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for it yet
        with locked(tmp_path, "output_dir"):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_lock_is_stale_if_it_was_cut_off_or_its_process_number_is_another_ones_now(tmp_path: Path) -> None:
    for content in ("", "half a", f"{socket.gethostname()} {os.getpid()} 1000000.0"):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(ZeroDivisionError), locked(tmp_path, "output_dir"):
            _ = 1 / 0  # a run that fails frees its folder too
        assert not (tmp_path / LOCK).exists()


def test_the_lock_of_another_host_says_how_to_remove_it_and_stays(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("elsewhere 12 1000000.0")
    said = refusal(tmp_path)
    assert "(host elsewhere, process 12); " in said
    assert said.endswith(f"or, if that run is dead, remove {tmp_path / LOCK}")
    assert (tmp_path / LOCK).read_text() == "elsewhere 12 1000000.0"
