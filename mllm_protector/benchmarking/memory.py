"""The highest memory of an arm, each in a process of its own: a used one has freed memory in store."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from mllm_protector.benchmarking.arms import ENTRIES, Bench, Settings
from mllm_protector.benchmarking.shape import Shape
from mllm_protector.benchmarking.workload import Texts
from mllm_protector.config import quiet_libraries
from mllm_protector.models import tuning


def peaks(
    entries: Sequence[tuple[str, str]], shape: Shape, texts: Texts, settings: Settings, threads: int
) -> list[int | None]:
    """The highest memory of one round of each arm, in bytes beyond what was there before (CPU).

    Args:
        entries: task and name of each arm.
        shape: of the model.
        texts: what the arms read.
        settings: what they are told.
        threads: of each process.
    """
    # One process imports everything and computes nothing; each arm gets a copy of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([tuning.__name__, __name__])  # the first one quiets bitsandbytes
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return [pool.submit(_peak, *entry, shape, texts, settings, threads).result() for entry in entries]


def _peak(task: str, name: str, shape: Shape, texts: Texts, settings: Settings, threads: int) -> int | None:
    quiet_libraries()
    torch.set_num_threads(threads)
    [entry] = [entry for entry in ENTRIES if (entry.task, entry.name) == (task, name)]
    bench = Bench(shape, texts, settings)
    arm = entry.build(bench)
    [rows] = bench.workload(entry.task).rounds(1)
    arm.step(rows[:2])  # what is loaded and set up once is not the arm's; two rows leave little in store
    _, reading = arm.step(rows)
    return reading.peak_memory_bytes
