"""What a piece of work took: time, memory on a GPU, and the tokens that went through the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MATMUL = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices that measure the device's peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One timed piece of work.

    Attributes:
        cost: seconds on a GPU; CPU-seconds of all threads on a CPU, where other work runs too.
        real_tokens: tokens that are not padding.
        positions: tokens with padding.
        forward_steps: calls of the model.
        peak_memory_bytes: beyond what was allocated at the start, on a GPU; ``None`` on a CPU.
        loss: the mean loss of a training step; ``None`` where nothing is trained.
    """

    cost: float
    real_tokens: int
    positions: int
    forward_steps: int
    peak_memory_bytes: int | None
    loss: float | None


class Meter:
    """Times the work between ``start`` and ``stop``, and counts the tokens that a model embeds meanwhile."""

    def __init__(self, model: torch.nn.Module, *, padding: Sequence[int]) -> None:
        """Listen to a model; ``padding`` has the ids that are not work."""
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._device = embedding.weight.device
        self._padding = torch.tensor(padding, device=self._device)
        self._running = False
        embedding.register_forward_pre_hook(self._count)

    def start(self) -> None:
        """Start again."""
        self._running = True
        self._positions = self._steps = self._memory = 0
        self._real = torch.zeros((), dtype=torch.int64, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._memory = torch.cuda.memory_allocated(self._device)
        self._begun = clock(self._device)

    def stop(self, loss: float | None = None) -> Reading:
        """What it took since ``start``; on a GPU until all of it was done."""
        cost = clock(self._device) - self._begun
        self._running = False
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._memory
        return Reading(
            cost=cost,
            real_tokens=int(self._real),
            positions=self._positions,
            forward_steps=self._steps,
            peak_memory_bytes=peak,
            loss=loss,
        )

    def _count(self, embedding: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if self._running:
            [ids] = arguments
            self._steps += 1
            self._positions += ids.numel()
            self._real += (~torch.isin(ids, self._padding)).sum()


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second in one large matrix product; the fastest of many is the device's peak."""
    side = MATMUL[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    begun = clock(device)
    left @ right
    return 2 * side**3 / (clock(device) - begun)


def clock(device: torch.device) -> float:
    """CPU-seconds of this process on a CPU; seconds on a GPU, once it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
