"""Several processes that share one job: how they join, and which rows each of them takes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from mllm_protector.errors import RunError

PATIENCE = timedelta(days=1)
"""How long processes wait for what the first one prepares."""

E = TypeVar("E")
V = TypeVar("V")


class Processes(Generic[V]):
    """Divides rows among the processes and gathers the results in the order of the rows."""

    def __init__(self, index: int, count: int) -> None:
        """This is process ``index`` of ``count``."""
        self.index = index
        self.count = count

    def mine(self, rows: Sequence[E]) -> Sequence[E]:
        """Every ``count``-th row."""
        return rows[self.index :: self.count]

    def gather(self, values: Sequence[V], total: int) -> list[V]:
        """The values of all processes for ``total`` rows, each row once."""
        if self.count == 1:
            return list(values)
        parts: list[list[V]] = gather_object([list(values)])
        return [parts[row % self.count][row // self.count] for row in range(total)]

    def from_first(self, value: E) -> E:
        """The first process's value, on every process. It should be small: it is sent as a pickle."""
        values = [value]
        if self.count > 1:
            broadcast_object_list(values)
        return values[0]

    def largest(self, number: int) -> int:
        """The largest number among all processes."""
        if self.count == 1:
            return number
        together = torch.tensor(number, device=PartialState().device)
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
        return int(together)


def start_accelerator(precision: str, patience: timedelta | None = None) -> Accelerator:
    """Join the other processes, on GPUs if there are any.

    Args:
        precision: ``bf16`` for autocast to it.
        patience: how long processes wait for one another; ``None`` for PyTorch's own limit.

    Raises:
        RunError: the launcher asked for a different number of processes.
    """
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise RunError(
            "accelerate launch starts a single process on CPUs; use torchrun --nproc-per-node <processes>"
        )
    # An earlier training in this process, as in a sweep, may have used another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)] if patience else None,
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise RunError(f"{asked} processes were asked for, but {accelerator.num_processes} run together")
    return accelerator


def leave_processes() -> None:
    """Leave the process group. A script does this last.

    Otherwise threads that still listen to the other processes may abort the interpreter at its end.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process writes the shared files."""
    return bool(PartialState(cpu=not torch.cuda.is_available()).is_main_process)


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block on the first process while the others wait; then they run it too and find it done.

    They wait for up to ``PATIENCE``. PyTorch's own limit of ten minutes on GPUs is too short for a million
    texts.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes == 1:
        yield
        return
    waiting = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    if not state.is_main_process:
        torch.distributed.barrier(waiting)
    yield
    if state.is_main_process:
        torch.distributed.barrier(waiting)
    torch.distributed.destroy_process_group(waiting)
