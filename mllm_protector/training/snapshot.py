"""All that a training changes as it goes, as named tensors and JSON, and back.

The form is the same whatever the strategy: one process, several copies of the model, or one model sharded
over processes. So a training may go on with another number of processes. What is kept: parameters that
require a gradient, the optimizer's state, the schedule, and the state of the random numbers. Frozen
parameters and buffers are not: they come from the model's own folder and do not change.
"""

import logging
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LRScheduler

from mllm_protector.errors import InputError
from mllm_protector.processes import Processes

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


class Snapshot(NamedTuple):
    """The state of a training between two steps.

    Attributes:
        tensors: ``model``: the trained parameters by name; ``optimizer``: as ``<parameter>/<what>``, such as
            ``head.weight/exp_avg``. Whole and on the CPU.
        state: ``scheduler`` and, for each process, ``random``; JSON takes it.
    """

    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    processes: Processes[Any],
) -> Snapshot:
    """A copy of a training's state; every process must call it, the first one's result is complete.

    Args:
        model: the bare model, not a wrapper of it; its parameters may be sharded (DTensor).
        optimizer: over parameters of that model.
        scheduler: of that optimizer.
        processes: that train together.
    """
    first = processes.index == 0
    parameters = _trained(model)
    whole: dict[str, dict[str, torch.Tensor]] = {
        "model": _gather(parameters.items(), keep=first),
        "optimizer": _gather(_optimizer_tensors(parameters, optimizer), keep=first),
    }
    randoms = processes.gather([_random_state()], processes.count)
    return Snapshot(whole, {"scheduler": scheduler.state_dict(), "random": randoms})


def restore(
    snapshot: Snapshot,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    processes: Processes[Any],
) -> None:
    """Put a training back into a captured state, in place; every process must call it.

    It is the last thing to do before the next step: whatever draws random numbers in between is felt.

    Args:
        snapshot: the complete one, on every process.
        model: as for ``capture``, and so are the others. They may be sharded in another way.
        optimizer: see there.
        scheduler: see there.
        processes: if there are more or fewer than before, the random numbers go on as they are.

    Raises:
        InputError: the snapshot is of other parameters. Nothing has been changed then.
    """
    parameters = _trained(model)
    _require_same(parameters, snapshot.tensors["model"])
    _require_fitting(parameters, snapshot.tensors["optimizer"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_copy(snapshot.tensors["model"][name], parameter))
    scheduler.load_state_dict(dict(snapshot.state["scheduler"]))
    _restore_optimizer(parameters, optimizer, snapshot.tensors["optimizer"], scheduler.get_last_lr())
    randoms = snapshot.state["random"]
    if len(randoms) == processes.count:
        _set_random_state(randoms[processes.index])
    else:
        log.info(
            "resumed on %s process(es) instead of %s",
            processes.count,
            len(randoms),
        )


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is trained by name; a parameter with two names, as tied embeddings have, is there once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(
    parameters: Tensors, optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, torch.Tensor]]:
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", value


def _gather(tensors: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, one after the other; they share no memory with what is trained."""
    whole = {}
    for name, tensor in tensors:
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        if keep:
            whole[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return whole


def _require_same(parameters: Tensors, saved: Tensors) -> None:
    different = sorted(parameters.keys() ^ saved.keys())
    if different:
        where = (
            "the checkpoint, but not in the model" if different[0] in saved else "the model, but not saved"
        )
        raise _other_model(f"{different[0]} is trained in {where}")
    for name, parameter in parameters.items():
        if (parameter.shape, parameter.dtype) != (saved[name].shape, saved[name].dtype):
            raise _other_model(f"{name} is {_form(parameter)} in the model and {_form(saved[name])} saved")


def _require_fitting(parameters: Tensors, saved: Tensors) -> None:
    for key, value in saved.items():
        name, _, _ = key.rpartition("/")
        if name not in parameters or (value.ndim > 0 and value.shape != parameters[name].shape):
            raise _other_model(f"the optimizer's {key} fits no trained parameter")


def _other_model(difference: str) -> InputError:
    return InputError(
        f"the checkpoint is of another model or tuning: {difference}; choose another output_dir, "
        "or give resume=never to start over"
    )


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _restore_optimizer(
    parameters: Tensors, optimizer: torch.optim.Optimizer, saved: Tensors, learning_rates: Iterable[Any]
) -> None:
    packed = optimizer.state_dict() | {"state": {}}
    numbers: dict[int, int] = {}
    for group, packed_group, rate in zip(
        optimizer.param_groups, packed["param_groups"], learning_rates, strict=True
    ):
        packed_group["lr"] = rate
        numbers |= zip(map(id, group["params"]), packed_group["params"], strict=True)
    for key, value in saved.items():
        name, _, what = key.rpartition("/")
        of_parameter = packed["state"].setdefault(numbers[id(parameters[name])], {})
        of_parameter[what] = _copy(value, parameters[name]) if value.ndim else value.clone()
    # It puts the step counts where this kind of optimizer wants them.
    optimizer.load_state_dict(packed)


def _copy(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, placed and sharded as another one. All processes meet here."""
    if isinstance(like, DTensor):
        value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(value)


def _random_state() -> dict[str, Any]:
    """Of this process, and of its own GPU if it has one."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], *rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
