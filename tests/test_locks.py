"""Runs that want the same folder at once."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mllm_protector.errors import InputError
from mllm_protector.locks import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from mllm_protector.locks import locked
with locked(Path(sys.argv[1]), "output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused, locked(folder, "output_dir"):
        raise AssertionError("two runs in one folder")
    return str(refused.value)


def test_a_second_run_is_refused_with_host_and_process_until_the_first_one_ends(tmp_path: Path) -> None:
    with another_run(tmp_path) as process:
        assert refusal(tmp_path) == (
            f"output_dir={tmp_path}: another run writes there (host {socket.gethostname()}, process "
            f"{process.pid}); wait for it or choose another output_dir"
        )
    with locked(tmp_path, "output_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    with another_run(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for it yet
        with locked(tmp_path, "output_dir"):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_lock_is_stale_if_it_was_cut_off_or_its_process_number_is_another_ones_now(tmp_path: Path) -> None:
    for content in ("", "half a", f"{socket.gethostname()} {os.getpid()} 1000000.0"):
        (tmp_path / LOCK).write_text(content)
        with locked(tmp_path, "output_dir"):
            pass
        assert not (tmp_path / LOCK).exists()


def test_the_lock_of_another_host_says_how_to_remove_it_and_stays(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("elsewhere 12 1000000.0")
    said = refusal(tmp_path)
    assert "(host elsewhere, process 12); " in said
    assert said.endswith(f"or, if that run is dead, remove {tmp_path / LOCK}")
    assert (tmp_path / LOCK).read_text() == "elsewhere 12 1000000.0"


def test_a_run_that_fails_gives_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "output_dir"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
