"""How a training stops and resumes: its state, when it is written to a checkpoint, and signals.

The plan of batches is a pure function of seed and epoch, so the number of steps done says which examples come
next. With the same number of processes a resumed training ends bit for bit as one that was never stopped (on
CPUs; on GPUs as far as their kernels are deterministic).
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler

from mllm_protector.errors import InputError, RunError
from mllm_protector.processes import Processes
from mllm_protector.training.checkpoints import Checkpoint, Checkpoints
from mllm_protector.training.settings import CheckpointConfig, Resume

log = logging.getLogger(__name__)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Whole tensors, on the CPU of the first process."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 2.0
"""A scheduler signals a launcher and its processes alike, and the launcher passes the signal on."""

OTHERWISE = "choose another output_dir, or give resume=never to start over"

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a training changes; every process has one and calls it at the same steps.

    It has the same form for one process, copies and shards, so a training may resume on another number of
    processes. Frozen parameters and buffers are left out: they come from the model's own folder.

    Attributes:
        model: the unwrapped model; its parameters may be sharded.
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
        """Put a captured state back, in place; every process gives all of it.

        With another number of processes the random numbers stay as they are. (The training's own draws do
        not depend on them.)

        Raises:
            InputError: the state is of other parameters. Nothing has been changed then.
        """
        trained = self._trained()
        now, then = (
            {_dotted(k): (p.dtype, p.shape) for k, p in t.items()} for t in (trained, tensors["model"])
        )
        if changed := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
            raise InputError(f"the checkpoint is of another model or tuning ({changed[0]}); {OTHERWISE}")
        moments: dict[str, dict[str, Any]] = {key: {} for key in trained}
        for name, tensor in tensors["optimizer"].items():
            parameter, _, what = name.rpartition("/")
            moments[parameter.replace(".", "/")][what] = tensor
        options = StateDictOptions(full_state_dict=True)
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
    """The checkpoints of one training. Every process has one and calls it at the same steps.

    Attributes:
        step: steps done already.
        progress: what the loop passed to ``after_step`` then; empty at the beginning of a training.
    """

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
            config: says when to write.
            resume: ``auto`` takes the newest intact checkpoint, ``never`` removes them all.
            identity: JSON; a checkpoint with another one is refused.
            state: of the training.

        Raises:
            InputError: the newest checkpoint is of another training.
            RunError: there are checkpoints but none is intact.
        """
        self._config, self._identity, self._state = config, dict(identity), state
        self._store = Checkpoints(folder, config.keep_last)
        self._processes = state.processes
        self._written = time.monotonic()
        found: Checkpoint | None = None
        if self._processes.index == 0:
            if resume == "never":
                self._store.clear()
            found = self._store.newest()
        self._checkpoint = self._processes.from_first(found)
        self.step = self._checkpoint.step if self._checkpoint else 0
        self.progress: dict[str, Any] = self._checkpoint.state["loop"] if self._checkpoint else {}
        if self._checkpoint is not None:
            self._require_same_training(self._checkpoint)

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
        if stopping or by_steps or self._processes.largest(late):
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
                f"{checkpoint.folder}: of another training ({'; '.join(changed[:3])}); {OTHERWISE}"
            )


def _dotted(key: str) -> str:
    return key.replace("/", ".")


def _random_state() -> dict[str, Any]:
    """Of PyTorch on this process, and on its GPU if it has one, in hexadecimal digits."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: state.numpy().tobytes().hex() for device, state in states.items()}


def _set_random_state(states: Mapping[str, Any]) -> None:
    setters = {"torch": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device, set_state in setters.items():
        if states.get(device) and (device == "torch" or torch.cuda.is_available()):
            set_state(torch.frombuffer(bytearray.fromhex(states[device]), dtype=torch.uint8))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values by their full names, such as ``data.fingerprint``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


class Stopped(RunError):
    """A training was asked to stop and saved its state (exit code 128 + the signal's number)."""

    def __init__(self, received: signal.Signals, step: int) -> None:
        super().__init__(
            f"stopped by {received.name} after step {step}; everything is saved, repeat the command to resume"
        )
        self.exit_code = 128 + received


class Interruption:
    """Notes the first SIGTERM or SIGINT, so that the step can be finished; a second one acts at once.

    It does so in the main thread only. A signal that was ignored before stays ignored, as for a job in the
    background.

    Attributes:
        signal: the first one received, or ``None``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif now - self._since > ECHO_SECONDS:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
