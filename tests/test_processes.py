import time
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from mllm_protector.processes import first_process_first, is_first_process
from tests.forked import Started

LIMIT, WORK = timedelta(seconds=6), 8.0
"""Of the processes' own collectives, and in seconds of what the first one prepares: longer."""


def prepare(path: Path) -> None:
    PartialState(cpu=True, timeout=LIMIT)
    with first_process_first():
        found = path.exists()
        if not found:
            time.sleep(WORK)
            path.touch()
    print("found" if found else "made")  # noqa: T201


def test_the_others_wait_for_the_first_process_longer_than_for_each_other(tmp_path: Path) -> None:
    ran = Started(prepare, tmp_path / "made", processes=2).end()
    assert ran.code == 0, ran.err
    assert sorted(ran.out.split()) == ["found", "made"]


def test_a_process_alone_waits_for_nobody() -> None:
    with first_process_first():
        assert is_first_process()
