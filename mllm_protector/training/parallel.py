"""How the processes of one training hold its model, and one step that they make together.

By default each process holds a copy (DDP); ``configs/accelerate/fsdp2.yaml`` shards weights, gradients and
optimizer state (FSDP2, on GPUs and CPUs alike).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mllm_protector.data.batching import GlobalStep, count_tokens, moved
from mllm_protector.data.encoding import IGNORED, Batch
from mllm_protector.errors import InputError
from mllm_protector.training.dropout import KEYS, dropout_keys, use_keyed_dropout
from mllm_protector.training.losses import LossFunction
from mllm_protector.training.resume import WHOLE
from mllm_protector.training.settings import Normalise

E = TypeVar("E")


class Objective(torch.nn.Module):
    """A model and its loss as one module, so that a wrapper sees every use of the model's weights.

    A loss may call a part of the model (its body, the weight of its head). Behind the back of a wrapper
    around the model alone, gradients would not be exchanged and sharded weights would not be gathered.
    """

    def __init__(self, model: torch.nn.Module, loss_fn: LossFunction) -> None:
        """Replace the model's dropout layers by keyed ones."""
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn
        self._keys = use_keyed_dropout(model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch, with the dropout of its ``KEYS`` if it has any; a scalar."""
        self._keys.current = batch.get(KEYS)
        return self._loss_fn(self.model, {name: each for name, each in batch.items() if name != KEYS})


class Parallel:
    """An objective as the processes hold it: in one process alone, copied (DDP) or sharded (FSDP2).

    Attributes:
        objective: called as ``objective(batch)`` for each loss.
        optimizer: over the objective's parameters.
    """

    def __init__(self, objective: Any, optimizer: torch.optim.Optimizer, *, reshard: bool = False) -> None:
        """``reshard``: layers are sharded again after their forward pass."""
        self.objective = objective
        self.optimizer = optimizer
        self._reshard = reshard
        self._shards = [module for module in objective.modules() if isinstance(module, FSDPModule)]

    def no_sync(self) -> AbstractContextManager[None]:
        """Around all micro-batches of a step but the last: copies exchange their gradients once a step.

        Shards exchange them in every backward pass, so that no process ever holds all gradients.
        """
        copied = isinstance(self.objective, DistributedDataParallel)
        context: AbstractContextManager[None] = self.objective.no_sync() if copied else nullcontext()
        return context

    def clip_gradient(self, longest: float | None) -> float:
        """Shorten a gradient longer than ``longest``; returns its norm before, the same on every process."""
        parameters = list(self.objective.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if longest is None else longest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, each process holds all weights and may run the unwrapped model as often as it likes.

        All processes enter and leave together, outside of ``torch.inference_mode``.
        """
        for shard in self._shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        try:
            yield
        finally:
            for shard in self._shards:
                shard.reshard()
                shard.set_reshard_after_forward(self._reshard and shard is not self.objective, recurse=False)

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The unwrapped model's state dict, for ``model.save_pretrained(folder, state_dict=...)``.

        Every process must call it. The first process gets everything, on the CPU if it was sharded.
        """
        weights: dict[str, Any] = (
            get_model_state_dict(model, options=WHOLE) if self._shards else model.state_dict()
        )
        return weights


def prepare(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
) -> Parallel:
    """Copy or shard an objective as the launcher asked for, and make its optimizer.

    ``make_optimizer`` gets the wrapped objective, because shards are other parameters.

    Raises:
        InputError: the first version of FSDP.
    """
    # From the environment: accelerate silently forgets the launcher's request where there is no GPU.
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        wrapped = accelerator.prepare(objective)
        return Parallel(wrapped, make_optimizer(wrapped))
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version={plugin.fsdp_version}: use 2, as configs/accelerate/fsdp2.yaml does")
    reshard = plugin.reshard_after_forward
    everywhere: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
    }
    # Gradients are summed in float32, and inputs keep the dtype that autocast gives them.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in _layers(objective):
        fully_shard(layer, mp_policy=policy, reshard_after_forward=reshard, **everywhere)
    # The rest stays whole from the objective's forward to the end of backward, in its own dtype: a loss may
    # use the weights of the head, and a float32 head computes in float32.
    fully_shard(objective, reshard_after_forward=False, **everywhere)
    return Parallel(objective, make_optimizer(objective), reshard=reshard)


def _layers(objective: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers of a transformer, by the class names that transformers gives for them."""
    names = {
        name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in objective.modules() if type(module).__name__ in names]


class MicroBatch(NamedTuple):
    """One forward pass of one process, and how many of its examples count: none where it only fills up."""

    batch: Batch
    examples: int


class StepResult(NamedTuple):
    """The outcome of one step, the same on every process.

    Attributes:
        loss: mean per target, or per example, of the whole step.
        gradient_norm: before clipping.
        finite: whether both are finite and the weights were updated.
        tokens: without padding.
        positions: all that were computed, with padding.
    """

    loss: float
    gradient_norm: float
    finite: bool
    tokens: int
    positions: int


def micro_batches(
    plan: GlobalStep,
    process: int,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    *,
    seed: int,
    step: int,
) -> list[MicroBatch]:
    """The forward passes of one process in a step, with the keys of their dropout.

    A process with nothing to do computes any example, which does not count: all meet in the backward pass.
    """
    made = []
    for indices in plan.shards[process]:
        chosen = indices or (0,)
        batch = collate([examples[index] for index in chosen])
        keys = dropout_keys(batch, chosen, seed=seed, step=step)
        made.append(MicroBatch({**batch, KEYS: keys}, examples=len(indices)))
    return made


def take_step(
    accelerator: Accelerator,
    parallel: Parallel,
    batches: Sequence[MicroBatch],
    clip_norm: float | None,
    normalise: Normalise,
) -> StepResult:
    """Add up the gradients of all micro-batches and update the weights once.

    The gradient is that of the mean loss over all targets, or examples, of the step, on all processes. If it
    or the loss is not finite, the weights stay as they are.
    Every process has the same number of ``batches``.
    """
    counts = torch.zeros(4, dtype=torch.float64)
    for batch, examples in batches:
        tokens, positions = count_tokens(batch)
        targets = int((batch["labels"] != IGNORED).sum())
        counts += (
            torch.tensor([targets, examples, tokens, positions])
            if examples
            else torch.tensor([0, 0, 0, positions])
        )
    targets, examples, tokens, positions = accelerator.reduce(counts.to(accelerator.device)).tolist()
    divisor = targets if normalise == "tokens" else examples
    summed = torch.zeros((), device=accelerator.device)
    for number, each in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else parallel.no_sync():
            with accelerator.autocast():
                loss = parallel.objective(moved(each.batch, accelerator.device)) * bool(each.examples)
            # Gradients are averaged over processes, hence the factor: their sum is wanted.
            (loss * (accelerator.num_processes / divisor)).backward()
        summed += loss.detach()
    norm = parallel.clip_gradient(clip_norm)
    mean = (accelerator.reduce(summed) / divisor).item()
    finite = math.isfinite(mean) and math.isfinite(norm)
    if finite:
        parallel.optimizer.step()
    parallel.optimizer.zero_grad()
    return StepResult(mean, norm, finite, int(tokens), int(positions))
