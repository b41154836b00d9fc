"""From readings to the figures of the report."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mllm_protector.benchmarking.meter import Reading


def spread(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``min`` and ``max``."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def figures(
    readings: Sequence[Reading],
    others: Mapping[str, Sequence[Reading]],
    *,
    flops: Sequence[int],
    peak: float,
    memory: Sequence[int | None],
) -> dict[str, Any]:
    """What is said of one arm.

    Args:
        readings: one for each round.
        others: the readings of other arms in the same rounds, by name; speeds are compared round by round.
        flops: useful operations of each round.
        peak: operations per second that the device can do; on a CPU per CPU-second.
        memory: readings of the highest memory, which are not always those of the rounds.
    """
    known = [amount for amount in memory if amount is not None]
    return {
        "repetitions": len(readings),
        "real_tokens_per_second": spread([taken.real_tokens / taken.seconds for taken in readings]),
        "real_tokens_per_cpu_second": spread([taken.real_tokens / taken.cpu_seconds for taken in readings]),
        "padded_over_real": spread([taken.positions / taken.real_tokens for taken in readings]),
        "forward_steps": spread([taken.forward_steps for taken in readings]),
        "mfu": spread([count / (taken.cost * peak) for count, taken in zip(flops, readings, strict=True)]),
        "peak_memory_bytes": spread(known) if known else None,
        "speed_up_over": {
            name: spread([theirs.cost / taken.cost for theirs, taken in zip(other, readings, strict=True)])
            for name, other in others.items()
        },
        "steps_saved_over": {
            name: spread(
                [
                    theirs.forward_steps / taken.forward_steps
                    for theirs, taken in zip(other, readings, strict=True)
                ]
            )
            for name, other in others.items()
        },
    }
