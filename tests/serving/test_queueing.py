import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mllm_protector.serving.queueing import BatchQueue, ExpiredError, FullError
from tests.serving.builders import queue_settings
from tests.serving.stubs import PATIENCE, until


class Recorder:
    """Doubles numbers; while the gate is closed it blocks."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def compute(self, rows: Sequence[int]) -> list[int]:
        self.batches.append([*rows])
        assert self.gate.wait(PATIENCE)
        if self.failure:
            raise self.failure
        return [2 * row for row in rows]


Queue = BatchQueue[int, int]


@asynccontextmanager
async def queue(recorder: Recorder, size: int = 4, **changes: Any) -> AsyncIterator[Queue]:
    made: Queue = BatchQueue(recorder.compute, lambda row: size, queue_settings(**changes), "test")
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        recorder.gate.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def blocked(queue: Queue, recorder: Recorder) -> AsyncIterator["asyncio.Task[int]"]:
    """The queue computes row -1 until the block ends."""
    recorder.gate.clear()
    first = asyncio.create_task(queue.submit(-1, math.inf))
    await until(lambda: recorder.batches)
    yield first
    recorder.gate.set()
    await first


def start(queue: Queue, rows: Sequence[int], expires: float = math.inf) -> "list[asyncio.Task[int]]":
    return [asyncio.create_task(queue.submit(row, expires)) for row in rows]


def test_each_caller_gets_the_value_of_its_own_row() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder) as made:
            values = await asyncio.gather(*start(made, range(500)))
        assert values == [2 * row for row in range(500)]
        assert [row for batch in recorder.batches for row in batch] == [*range(500)]
        assert len(recorder.batches) < 50

    asyncio.run(scenario())


def test_a_batch_holds_no_more_tokens_than_it_may() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder, size=400, batch_tokens=250, patience_ms=300) as made:
            await asyncio.gather(*start(made, range(8)))
        assert [len(batch) for batch in recorder.batches] == [2, 2, 2, 2]

    asyncio.run(scenario())


def test_a_row_that_is_larger_than_a_batch_goes_alone() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder, size=5000, batch_tokens=1000) as made:
            assert await asyncio.gather(*start(made, [1, 2])) == [2, 4]
        assert recorder.batches == [[1], [2]]

    asyncio.run(scenario())


def test_a_lone_row_waits_for_others_as_long_as_patience_says_and_no_longer() -> None:
    async def scenario() -> None:
        async with queue(Recorder(), patience_ms=300) as made:
            started = time.monotonic()
            assert await made.submit(1, math.inf) == 2
            assert 0.29 < time.monotonic() - started < 5

    asyncio.run(scenario())


def test_what_gathered_while_a_batch_was_computed_goes_without_more_patience() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder, patience_ms=2000) as made:
            async with blocked(made, recorder):
                rest = start(made, range(10))
                await asyncio.sleep(2.1)
            started = time.monotonic()
            await asyncio.gather(*rest)
            assert time.monotonic() - started < 1.9
        assert recorder.batches[1:] == [[*range(10)]]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("size", "changes"), [(4, {"waiting": 3}), (400_000, {"waiting_mb": 1.5, "request_mb": 1})]
)
def test_a_row_too_many_is_refused_at_once(size: int, changes: dict[str, Any]) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder, size=size, **changes) as made:
            async with blocked(made, recorder):
                waiting = start(made, range(3))
                await until(lambda: made.waiting == 3)
                started = time.monotonic()
                with pytest.raises(FullError) as full:
                    await made.submit(4, math.inf)
                assert time.monotonic() - started < 5
                assert 0 < full.value.retry_after <= 60
                within = asyncio.create_task(made.submit(5, math.inf, limited=False))
            assert await asyncio.gather(*waiting, within) == [0, 2, 4, 10]
            assert await made.submit(6, math.inf) == 12

    asyncio.run(scenario())


def test_a_row_whose_caller_gave_up_or_whose_time_is_over_is_not_computed() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with queue(recorder) as made:
            async with blocked(made, recorder):
                [late] = start(made, [1], expires=time.monotonic() + 0.05)
                [left, kept] = start(made, [2, 3])
                await until(lambda: made.waiting == 3)
                left.cancel()
                await asyncio.sleep(0.1)
            with pytest.raises(ExpiredError):
                await late
            assert await kept == 6
        assert recorder.batches == [[-1], [3]]

    asyncio.run(scenario())


def fails(recorder: Recorder) -> None:
    recorder.failure = ValueError("a fault")


def forgets(recorder: Recorder) -> None:
    recorder.compute = lambda rows: []  # type: ignore[method-assign]


@pytest.mark.parametrize("break_it", [fails, forgets])
def test_a_fault_reaches_every_caller_of_its_batch_only(
    break_it: Callable[[Recorder], None],
) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        break_it(recorder)
        async with queue(recorder) as made:
            for _ in range(2):  # the queue goes on
                results = await asyncio.gather(*start(made, range(3)), return_exceptions=True)
                assert [type(result) for result in results] == 3 * [ValueError]

    asyncio.run(scenario())


def test_rows_that_wait_when_the_queue_ends_are_cancelled() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        made: Queue = BatchQueue(recorder.compute, lambda row: 4, queue_settings(), "test")
        task = asyncio.create_task(made.run())
        recorder.gate.clear()
        under_way = start(made, [0])
        await until(lambda: recorder.batches)
        waiting = start(made, [1])
        await until(lambda: made.waiting)
        task.cancel()
        results = await asyncio.gather(*under_way, *waiting, return_exceptions=True)
        assert [type(result) for result in results] == 2 * [asyncio.CancelledError]
        recorder.gate.set()

    asyncio.run(scenario())
