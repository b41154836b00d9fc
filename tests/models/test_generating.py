from collections.abc import Sequence

import pytest
import torch

from mllm_protector.models.generating import Batches, is_out_of_memory
from tests.cases import case


class Work:
    """Doubles numbers, with memory for a sum of so much; zero is a row that it chokes on."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.batches: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.batches.append([*rows])
        if sum(rows) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if 0 in rows:
            raise ValueError("zero")
        return [2 * row for row in rows]


def test_a_batch_is_halved_until_it_fits_and_each_row_is_done_once() -> None:
    work = Work(memory=3)
    batches = Batches(work, size=8)
    assert batches.run([1] * 8) == [2] * 8
    assert batches.size == 2
    assert [len(batch) for batch in work.batches] == [8, 4, 2, 2, 2, 2]


def test_a_row_that_is_too_large_alone_does_not_make_other_batches_smaller() -> None:
    batches = Batches(Work(memory=8), size=4)
    first, large, *others = batches.run([1, 9, 2, 3])
    assert (first, *others) == (2, 4, 6)
    assert isinstance(large, torch.OutOfMemoryError)
    assert batches.size == 4


def test_a_try_that_failed_for_memory_keeps_no_frames_alive() -> None:
    [problem] = Batches(Work(memory=0), size=1).run([1])
    assert isinstance(problem, torch.OutOfMemoryError)
    assert problem.__traceback__ is None


def test_a_row_that_is_choked_on_is_found() -> None:
    results = Batches(Work(memory=9), size=4).run([1, 0, 2])
    assert (results[0], results[2]) == (2, 4)
    assert isinstance(results[1], ValueError)


def test_what_every_row_fails_with_is_raised() -> None:
    with pytest.raises(ValueError, match="zero"):
        Batches(Work(memory=9), size=2).run([0, 0])
    with pytest.raises(ValueError, match="zero"):
        Batches(Work(memory=9), size=1).run([0, 0])
    [alone] = Batches(Work(memory=9), size=1).run([0])
    assert isinstance(alone, ValueError)


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    for error, expected in [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("cannot read 'the tank is out of memory'"), False),
    ]:
        with case(error, expected):
            assert is_out_of_memory(error) is expected
