"""Rows of concurrent callers become batches, which are computed one after the other in a thread."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from mllm_protector.guard.protector import BYTES_PER_TOKEN
from mllm_protector.serving.settings import MEGABYTE, QueueSettings

E = TypeVar("E")
V = TypeVar("V")

LONGEST_RETRY = 60.0
"""Seconds that a caller is asked to wait at most."""


class FullError(Exception):
    """No room for another row.

    Attributes:
        retry_after: seconds in which about half of what waits now will be done.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many requests wait")
        self.retry_after = retry_after


class ExpiredError(Exception):
    """The deadline of a row passed before it was computed."""


@dataclass(slots=True)
class _Entry(Generic[E, V]):
    row: E
    size: int
    arrived: float
    expires: float
    future: "asyncio.Future[V]"


class BatchQueue(Generic[E, V]):
    """Collects rows until a batch is full, or the first of them has waited for long enough.

    While a batch is computed the next one gathers, and then goes without further patience. A row whose caller
    gave up, or whose deadline has passed, is dropped uncomputed.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[E]], Sequence[V]],
        size: Callable[[E], int],
        settings: QueueSettings,
        name: str,
        observe: Callable[[str, Sequence[float], float], None] = lambda name, waits, seconds: None,
    ) -> None:
        """Set up an empty queue; ``run`` computes what is put into it.

        Args:
            compute: one value for each row, in their order; called in a thread, one call at a time.
            size: bytes of a row.
            settings: the limits.
            name: of the thread.
            observe: gets after each batch the name, the seconds that each row waited, and those of computing.
        """
        self._compute = compute
        self._size = size
        self._name = name
        self._observe = observe
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting: deque[_Entry[E, V]] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._seconds_per_byte = 0.0
        self.busy_since: float | None = None
        self.batches = 0

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return len(self._waiting)

    @property
    def _batch_bytes(self) -> int:
        return self._settings.batch_tokens * BYTES_PER_TOKEN

    async def submit(self, row: E, expires: float, *, limited: bool = True) -> V:
        """The value of a row.

        Args:
            row: what to compute.
            expires: the ``time.monotonic()`` after which nobody wants it any more.
            limited: whether the row is refused if too many wait.

        Raises:
            FullError: too many rows wait, or too large ones.
            ExpiredError: it was not begun in time.
            Exception: what ``compute`` raised.
        """
        size = self._size(row)
        too_many = len(self._waiting) >= self._settings.waiting
        too_large = self._bytes + size > self._settings.waiting_mb * MEGABYTE
        if limited and self._waiting and (too_many or too_large):
            seconds = self._bytes * self._seconds_per_byte / 2
            raise FullError(min(max(seconds, 0.1), LONGEST_RETRY))
        future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(row, size, time.monotonic(), expires, future))
        self._bytes += size
        self._arrived.set()
        if self._bytes >= self._batch_bytes:
            self._full.set()
        return await future

    async def run(self) -> None:
        """Compute batches until it is cancelled; what waits then is dropped, and a batch under way ends."""
        try:
            while True:
                if batch := await self._gather():
                    await self._settle(batch)
        finally:
            self._thread.shutdown(wait=False)
            for entry in self._waiting:
                entry.future.cancel()

    async def _gather(self) -> list[_Entry[E, V]]:
        self._arrived.clear()
        if not self._waiting:
            await self._arrived.wait()
        patience = self._waiting[0].arrived + self._settings.patience_ms / 1000 - time.monotonic()
        self._full.clear()
        if self._bytes < self._batch_bytes and patience > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), patience)
        batch: list[_Entry[E, V]] = []
        taken = 0
        while self._waiting and (not batch or taken + self._waiting[0].size <= self._batch_bytes):
            entry = self._waiting.popleft()
            self._bytes -= entry.size
            if entry.future.done():
                continue
            if entry.expires < time.monotonic():
                entry.future.set_exception(ExpiredError())
                continue
            batch.append(entry)
            taken += entry.size
        return batch

    async def _settle(self, batch: list[_Entry[E, V]]) -> None:
        rows = [entry.row for entry in batch]
        started = self.busy_since = time.monotonic()
        try:
            values = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, rows)
            pairs = list(zip(batch, values, strict=True))
        except Exception as error:
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
            return
        except asyncio.CancelledError:
            for entry in batch:
                entry.future.cancel()
            raise
        finally:
            self.busy_since = None
            self.batches += 1
            seconds = time.monotonic() - started
            self._observe(self._name, [started - entry.arrived for entry in batch], seconds)
        self._seconds_per_byte = seconds / max(1, sum(entry.size for entry in batch))
        for entry, value in pairs:
            if not entry.future.done():
                entry.future.set_result(value)
