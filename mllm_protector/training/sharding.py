"""How the processes of one training hold its model: a copy each, or a share of the weights each.

The launcher chooses: by itself it is a copy each (DDP); ``configs/accelerate/fsdp2.yaml`` shares weights,
gradients and optimizer state out (FSDP2, on GPUs and CPUs alike); ``deepspeed_zero*.yaml`` leave all that to
DeepSpeed. The loop sees a ``Replicated`` and knows none of them by name.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mllm_protector.errors import InputError, RunError

MakeOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Replicated:
    """All weights in each process: one process alone, or DDP.

    Attributes:
        objective: to be called as ``objective(batch)`` for each loss that is trained on.
        optimizer: the torch optimizer; a scheduler of the learning rate goes on this one.
        resumable: whether a parameter's state in ``optimizer`` is all of its state.
    """

    resumable = True

    def __init__(self, objective: Any, optimizer: torch.optim.Optimizer) -> None:
        """Hold what ``prepare`` has prepared."""
        self.objective = objective
        self.optimizer = optimizer

    def last_pass(self, is_last: bool) -> AbstractContextManager[None]:
        """What a forward and its backward pass go into: gradients travel with the last pass of a step."""
        at_once = is_last or not isinstance(self.objective, DistributedDataParallel)
        context: AbstractContextManager[None] = nullcontext() if at_once else self.objective.no_sync()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss, averaged over the processes."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, longest: float | None) -> float:
        """Shorten a gradient longer than ``longest``; its norm before that, the same on every process."""
        parameters = list(self.objective.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if longest is None else longest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def forget_gradients(self) -> None:
        """Make ready for the next step."""
        self.optimizer.zero_grad()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the bare model has all weights in each process, which may run it as often as it likes.

        All processes enter and leave together. To be entered outside of ``torch.inference_mode``.
        """
        return nullcontext()

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The bare model's state dict, for ``model.save_pretrained(folder, state_dict=...)``.

        To be called on every process; only the first one's answer is sure to be complete.
        """
        return model.state_dict()


class Sharded(Replicated):
    """FSDP2: a share of every weight in each process, put together layer by layer as it is needed.

    Each backward pass hands its gradients on at once, so that no process ever holds all of them.
    """

    def __init__(self, objective: Any, optimizer: torch.optim.Optimizer, *, reshard: bool) -> None:
        """Hold an objective that went through ``fully_shard``, its layers with ``reshard``."""
        super().__init__(objective, optimizer)
        self._reshard = reshard

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Put everything together at once: the weights must fit into each process."""
        groups = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            yield
        finally:
            for group in groups:
                group.reshard()
                group.set_reshard_after_forward(self._reshard and group is not self.objective, recurse=False)

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Put together one after the other, on the first process's CPU."""
        keep = torch.distributed.get_rank() == 0
        gathered = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                gathered[name] = full.cpu()
        return gathered


class DeepSpeed(Replicated):
    """ZeRO. The engine clips and steps by itself and keeps the optimizer's state where only it finds it."""

    resumable = False

    def __init__(
        self, objective: Any, optimizer: torch.optim.Optimizer, gather: Callable[[], dict[str, torch.Tensor]]
    ) -> None:
        """Hold a ``DeepSpeedEngine``; ``gather`` gives its module's state dict."""
        super().__init__(objective, optimizer)
        self._gather = gather

    def last_pass(self, is_last: bool) -> AbstractContextManager[None]:
        """Tell the engine whether a step follows."""
        self.objective.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """As the engine does it."""
        self.objective.backward(loss)

    def clip(self, longest: float | None) -> float:
        """Clip *and step*: the engine does both at once, also where the gradient is not finite."""
        self.objective.optimizer.clip_grad = longest or 0.0
        self.objective.step()
        return float(self.objective.get_global_grad_norm())

    def step(self) -> None:
        """Done with ``clip``."""

    def forget_gradients(self) -> None:
        """Done with ``clip``."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Stage 3: gather the weights, and take off the hooks that would wait for the other processes."""
        offload = getattr(self.objective.optimizer, "parameter_offload", None)
        if offload is None:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.objective.parameters())):
            offload._remove_module_hooks()
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """As accelerate collects them, under the bare model's own names."""
        [prefix] = [name for name, module in self.objective.module.named_modules() if module is model]
        return {name.removeprefix(f"{prefix}."): tensor for name, tensor in (self._gather() or {}).items()}


def prepare(
    accelerator: Accelerator, objective: torch.nn.Module, make_optimizer: MakeOptimizer
) -> Replicated:
    """Divide an objective among the processes as the launcher was told to, and make its optimizer.

    Args:
        accelerator: has joined the processes.
        objective: the module whose ``forward`` gives the loss.
        make_optimizer: over the parameters of the module it is given; shares are other parameters.

    Raises:
        InputError: FSDP in its first version.
        RunError: DeepSpeed was asked for and does not run here.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # accelerate forgets what its launcher was asked for, silently, where there is no GPU.
        return _shard(accelerator, objective, make_optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # of no influence, but it must be a number
        # Autocast over float32 weights, as everywhere else, instead of weights that are bfloat16 themselves.
        bf16 = settings.pop("bf16", {}).get("enabled", False)
        settings["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16"}
        optimizer = make_optimizer(objective)
        engine, _ = accelerator.prepare(objective, optimizer)
        return DeepSpeed(engine, optimizer, lambda: accelerator.get_state_dict(engine))
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise RunError("DeepSpeed was asked for but needs GPUs; use configs/accelerate/fsdp2.yaml or none")
    wrapped = accelerator.prepare(objective)
    return Replicated(wrapped, make_optimizer(wrapped))


def _shard(accelerator: Accelerator, objective: torch.nn.Module, make_optimizer: MakeOptimizer) -> Sharded:
    plugin = FullyShardedDataParallelPlugin()  # the launcher's settings, from the environment
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version={plugin.fsdp_version}: use 2, as configs/accelerate/fsdp2.yaml does")
    reshard = plugin.reshard_after_forward
    everywhere: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
    }
    # Gradients are summed in float32, and inputs stay what autocast makes of them.
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
    return Sharded(objective, make_optimizer(objective), reshard=reshard)


def _layers(objective: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers of a transformer, by the class names that transformers gives for them."""
    names = {
        name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [module for module in objective.modules() if type(module).__name__ in names]
