"""What a piece of work took: time, memory, and the tokens that went through the model."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One timed piece of work.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of all threads together.
        real_tokens: tokens that are no padding.
        positions: tokens with padding.
        forward_steps: times that the model was called.
        peak_memory_bytes: beyond what was there at the start; ``None`` where the system does not tell. On a
            CPU only a fresh process tells the truth: a used one has memory in store.
        on_gpu: whether the model computes on a GPU.
    """

    seconds: float
    cpu_seconds: float
    real_tokens: int
    positions: int
    forward_steps: int
    peak_memory_bytes: int | None
    on_gpu: bool

    @property
    def cost(self) -> float:
        """Seconds on a GPU; on a CPU, which others use too, CPU-seconds."""
        return self.seconds if self.on_gpu else self.cpu_seconds


class Meter:
    """Times what lies between ``start`` and ``stop``, and counts the tokens that a model embeds meanwhile."""

    def __init__(self, model: torch.nn.Module, *, padding: Sequence[int]) -> None:
        """Listen to a model.

        Args:
            model: a transformers model, or one wrapped by PEFT.
            padding: ids that are no work: no text contains them.
        """
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._device = embedding.weight.device
        self._padding = torch.tensor(padding, device=self._device)
        self._running = False
        embedding.register_forward_pre_hook(self._count)

    def start(self) -> None:
        """Begin anew."""
        self._running = True
        self._positions = self._steps = 0
        self._real = torch.zeros((), dtype=torch.int64, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._memory: int | None = torch.cuda.memory_allocated(self._device)
        else:
            self._memory = forget_peak()
        self._begun = time.perf_counter(), time.process_time()

    def stop(self) -> Reading:
        """What it took since ``start``; on a GPU until all of it was done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        self._running = False
        peak = (
            torch.cuda.max_memory_allocated(self._device)
            if self._device.type == "cuda"
            else resident("VmHWM")
        )
        return Reading(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            real_tokens=int(self._real),
            positions=self._positions,
            forward_steps=self._steps,
            peak_memory_bytes=None if peak is None or self._memory is None else peak - self._memory,
            on_gpu=self._device.type == "cuda",
        )

    def _count(self, embedding: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if self._running:
            [ids] = arguments
            self._steps += 1
            self._positions += ids.numel()
            self._real += (~torch.isin(ids, self._padding)).sum()


def forget_peak() -> int | None:
    """Let the highest memory of this process begin anew; what it has now, or ``None`` if that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return resident("VmRSS")


def resident(field: str) -> int | None:
    """Bytes by Linux's account of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(found.group(1)) if found else None
