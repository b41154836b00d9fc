"""One optimisation step of all processes together."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator

from mllm_protector.data.batching import GlobalStep
from mllm_protector.data.encoding import IGNORED, Batch
from mllm_protector.data.packing import count_tokens, moved
from mllm_protector.training.dropout import KEYS, dropout_keys
from mllm_protector.training.settings import Normalise
from mllm_protector.training.sharding import Replicated

E = TypeVar("E")


class Slot(NamedTuple):
    """One forward pass of one process, and the examples that count in it: none where it only fills up."""

    batch: Batch
    examples: int


class Taken(NamedTuple):
    """What a step says, the same on every process.

    Attributes:
        loss: mean per target, or per example, of the whole step.
        gradient_norm: before it is clipped.
        tokens: real ones, without padding.
        positions: all that were computed, with padding.
    """

    loss: float
    gradient_norm: float
    tokens: int
    positions: int

    @property
    def finite(self) -> bool:
        """Whether the weights may be changed by it."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def slots_of(
    plan: GlobalStep,
    process: int,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    *,
    seed: int,
    step: int,
) -> list[Slot]:
    """The forward passes of one process, with the keys of their dropout.

    A process whose slot is empty computes any example, which does not count: all meet in the backward pass.
    """
    slots = []
    for indices in plan.shards[process]:
        chosen = indices or (0,)
        batch = collate([examples[index] for index in chosen])
        keys = dropout_keys(batch, chosen, seed=seed, step=step)
        slots.append(Slot({**batch, KEYS: keys}, examples=len(indices)))
    return slots


def take_step(
    accelerator: Accelerator,
    shared: Replicated,
    slots: Sequence[Slot],
    clip_norm: float | None,
    normalise: Normalise,
) -> Taken:
    """Add up the gradients of all slots and change the weights once.

    The gradient is that of the mean loss over all targets, or examples, of the step, on all processes. The
    weights stay as they are if it or the loss is not finite.

    Args:
        accelerator: joins the processes.
        shared: the objective and its optimizer.
        slots: of this process; every process has as many.
        clip_norm: longest gradient, or ``None``.
        normalise: what the summed loss is divided by.
    """
    targets, examples, tokens, positions = _count(accelerator, slots)
    divisor = targets if normalise == "tokens" else examples
    summed = torch.zeros((), device=accelerator.device)
    for number, slot in enumerate(slots, start=1):
        with shared.last_pass(number == len(slots)):
            with accelerator.autocast():
                loss = shared.objective(moved(slot.batch, accelerator.device)) * bool(slot.examples)
            # Gradients are averaged over processes, hence the factor: their sum is wanted.
            shared.backward(loss * (accelerator.num_processes / divisor))
        summed += loss.detach()
    norm = shared.clip(clip_norm)
    mean = accelerator.reduce(summed, reduction="sum") / divisor
    taken = Taken(mean.item(), norm, int(tokens), int(positions))
    if taken.finite:
        shared.step()
    shared.forget_gradients()
    return taken


def _count(accelerator: Accelerator, slots: Sequence[Slot]) -> list[float]:
    """Targets, examples, tokens and positions of all processes; what only fills up has positions alone."""
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, examples in slots:
        tokens, positions = count_tokens(batch)
        targets = int((batch["labels"] != IGNORED).sum())
        counted = (targets, examples, tokens) if examples else (0, 0, 0)
        sums += torch.tensor([*counted, positions], dtype=torch.float64)
    together: list[float] = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return together
