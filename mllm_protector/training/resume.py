"""The state of a training, when it is written to a checkpoint, and how it resumes.

The plan of batches is a pure function of seed and epoch, so the number of steps done says which examples come
next. With the same number of processes a resumed training ends bit for bit as one that was never stopped (on
CPUs; on GPUs as far as their kernels are deterministic).
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler

from mllm_protector.errors import InputError
from mllm_protector.processes import Processes
from mllm_protector.training.checkpoints import Checkpoint, Checkpoints
from mllm_protector.training.settings import CheckpointConfig, Resume

log = logging.getLogger(__name__)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Whole tensors, on the CPU of the first process."""

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a training changes as it goes; every process has one and calls it at the same steps.

    What it gives has the same form for one process, copies and shards, so a training may resume on another
    number of processes. Frozen parameters and buffers are left out: they come from the model's own folder.

    Attributes:
        model: the bare model; its parameters may be sharded.
        optimizer: over its trained parameters.
        scheduler: of that optimizer.
        processes: that train together.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    processes: Processes[Any]

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and JSON; complete on the first process.

        The tensors are ``model``: trained parameters by name, and ``optimizer``: its state by
        ``<parameter>/<what>``, such as ``head.weight/exp_avg``. They may share memory with the training.
        """
        trained = self._trained()
        weights: dict[str, Any] = get_model_state_dict(trained, options=WHOLE)
        optimizer: dict[str, Any] = get_optimizer_state_dict(trained, self.optimizer, options=WHOLE)
        tensors = {
            "model": {_dotted(key): tensor for key, tensor in weights.items()},
            "optimizer": {
                f"{_dotted(key)}/{what}": tensor
                for key, moments in optimizer.get("state", {}).items()
                for what, tensor in moments.items()
            },
        }
        randoms = self.processes.gather([_random_state()], self.processes.count)
        return tensors, {"scheduler": self.scheduler.state_dict(), "random": randoms}

    def restore(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Put a captured state back, in place; whatever draws random numbers before the next step is felt.

        With another number of processes the random numbers stay as they are. (The training's own draws do
        not depend on them.)

        Args:
            tensors: all of them, on every process.
            state: the JSON beside them.

        Raises:
            InputError: the state is of other parameters. Nothing has been changed then.
        """
        trained = self._trained()
        _require_same({_dotted(key): each for key, each in trained.items()}, tensors["model"])
        options = StateDictOptions(full_state_dict=True)
        moments: dict[str, dict[str, Any]] = {key: {} for key in trained}
        for name, tensor in tensors["optimizer"].items():
            parameter, _, what = name.rpartition("/")
            moments[parameter.replace(".", "/")][what] = tensor
        optimizer: dict[str, Any] = get_optimizer_state_dict(trained, self.optimizer) | {"state": moments}
        weights: dict[str, Any] = {key: tensors["model"][_dotted(key)] for key in trained}
        set_optimizer_state_dict(trained, self.optimizer, optimizer, options=options)
        set_model_state_dict(trained, weights, options=options)
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        randoms, count = state["random"], self.processes.count
        if len(randoms) == count:
            _set_random_state(randoms[self.processes.index])
        else:
            log.info("resumed on %s process(es) instead of %s", count, len(randoms))

    def _trained(self) -> torch.nn.ParameterDict:
        """The trained parameters, each once, as a module for torch's functions; no key may have a dot."""
        named = self.model.named_parameters()
        return torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in named if p.requires_grad})


class Resumption:
    """The checkpoints of one training. Every process has one and calls it at the same steps."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        resume: Resume,
        *,
        identity: Mapping[str, Any],
        state: TrainingState,
    ) -> None:
        """Look for a checkpoint to resume from; nothing is restored yet.

        Args:
            folder: of the training's checkpoints.
            config: when to write.
            resume: ``auto`` takes the newest intact checkpoint, ``never`` removes them all.
            identity: what a checkpoint must have been written with; JSON.
            state: of the training.

        Raises:
            InputError: the newest checkpoint is of another training.
            RunError: there are checkpoints but none is intact.
        """
        self._config = config
        self._store = Checkpoints(folder, config.keep_last)
        self._identity = dict(identity)
        self._state = state
        self._processes = state.processes
        self._written = time.monotonic()
        found: Checkpoint | None = None
        if self._processes.index == 0:
            if resume == "never":
                self._store.clear()
            found = self._store.newest()
        self._checkpoint = self._processes.from_first(found)
        if self._checkpoint is not None:
            self._require_same_training(self._checkpoint)

    @property
    def step(self) -> int:
        """Steps done already."""
        return self._checkpoint.step if self._checkpoint else 0

    @property
    def progress(self) -> dict[str, Any]:
        """What the loop passed to ``after_step`` then; empty at the beginning of a training."""
        progress: dict[str, Any] = self._checkpoint.state["loop"] if self._checkpoint else {}
        return progress

    def restore(self) -> None:
        """Restore the training; the last thing to do before the next step."""
        if self._checkpoint is not None:
            tensors = {stem: self._checkpoint.tensors(stem) for stem in ("model", "optimizer")}
            self._state.restore(tensors, self._checkpoint.state)
            log.info("resuming after step %s from %s", f"{self.step:,}", self._checkpoint.folder)

    def after_step(self, step: int, progress: Callable[[], Mapping[str, Any]], *, stopping: bool) -> None:
        """Write a checkpoint if one is due.

        Args:
            step: the one just made.
            progress: gives what the loop itself needs to resume; JSON.
            stopping: no step will follow, so a checkpoint is due.

        Raises:
            RunError: it cannot be written.
        """
        every_steps, every_minutes = self._config.every_steps, self._config.every_minutes
        late = every_minutes is not None and time.monotonic() - self._written >= 60 * every_minutes
        by_steps = every_steps is not None and step % every_steps == 0
        if stopping or by_steps or bool(self._processes.largest(late)):
            tensors, state = self._state.capture()
            if self._processes.index == 0:
                self._store.write(step, tensors, {**state, "run": self._identity, "loop": dict(progress())})
            self._written = time.monotonic()

    def _require_same_training(self, checkpoint: Checkpoint) -> None:
        earlier, now = _flat(checkpoint.state["run"]), _flat(self._identity)
        changed = [
            f"{key} was {earlier.get(key)}, now {now.get(key)}"
            for key in sorted(earlier.keys() | now.keys())
            if earlier.get(key) != now.get(key)
        ]
        if changed:
            raise InputError(
                f"{checkpoint.folder}: of another training ({'; '.join(changed[:3])}); choose another "
                "output_dir, or give resume=never to start over"
            )


def _dotted(key: str) -> str:
    return key.replace("/", ".")


def _require_same(parameters: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(parameters.keys() | saved.keys()):
        now, then = (_form(tensors.get(name)) for tensors in (parameters, saved))
        if now != then:
            raise InputError(
                f"the checkpoint is of another model or tuning: {name} is {now} in the model and {then} in "
                "the checkpoint; choose another output_dir, or give resume=never to start over"
            )


def _form(tensor: torch.Tensor | None) -> str:
    return "not trained" if tensor is None else f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values by their full names, such as ``data.fingerprint``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
