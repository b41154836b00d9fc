"""How a training optimises, when it writes checkpoints, and what to lower if the memory runs out."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.errors import InputError, RunError
from mllm_protector.models.backbone import pick_device
from mllm_protector.models.generating import is_out_of_memory
from mllm_protector.models.tuning import is_quantized
from mllm_protector.training.logging import Tracker

Schedule = Literal["linear", "cosine", "constant_with_warmup"]
Precision = Literal["fp32", "bf16"]
Normalise = Literal["tokens", "examples"]
Resume = Literal["auto", "never"]

WITHOUT_INFLUENCE = (
    "micro_batch_tokens",
    "micro_batch_size",
    "packing",
    "gradient_checkpointing",
    "compile",
    "log_every",
)
"""Settings of memory, speed and logging: a resumed training may change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to optimise.

    The result depends on ``batch_size``, not on how a step is divided: the ``micro_batch`` settings,
    ``packing``, ``gradient_checkpointing`` and the number of processes change memory and speed only. That
    includes dropout (``training.dropout``), except dropout of attention weights.

    Attributes:
        epochs: passes over the training data.
        max_steps: stop after this many steps, whatever ``epochs`` says; ``None`` for no limit.
        batch_size: examples in one step, over all processes.
        micro_batch_tokens: positions in one forward pass of one process; ``None`` for no limit.
        micro_batch_size: examples in one forward pass of one process; ``None`` for no limit.
        packing: put texts end to end, without padding; for decoders (Llama, Qwen, Mistral, ...).
        normalise: divide the summed loss of a step by its target ``tokens``, or by its ``examples`` as in
            the paper's formula. A detector has one target per example.
        learning_rate: the peak, reached after the warm-up.
        schedule: from the peak down: ``linear`` or ``cosine`` to zero, or ``constant_with_warmup``.
        warmup: share of all steps, in [0, 1).
        weight_decay: on matrices; biases and norms are never decayed.
        clip_norm: longest gradient, or ``None``.
        precision: ``bf16`` computes in bfloat16 with float32 weights, head and loss.
        gradient_checkpointing: compute activations again in the backward pass: a third more work, far less
            memory.
        compile: use ``torch.compile``, which takes a minute at the start.
        validate_every: steps between validations; ``None`` for once an epoch.
        best_metric: the validation metric that decides which weights are kept.
        log_every: steps between lines of ``metrics.jsonl``.
    """

    epochs: int
    max_steps: int | None
    batch_size: int
    micro_batch_tokens: int | None
    micro_batch_size: int | None
    packing: bool
    normalise: Normalise
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    clip_norm: float | None
    precision: Precision
    gradient_checkpointing: bool
    compile: bool
    validate_every: int | None
    best_metric: str
    log_every: int

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: naming the key and its value.
        """
        counts = ("epochs", "max_steps", "batch_size", "micro_batch_tokens", "micro_batch_size")
        _require_counts(self, *counts, "validate_every", "log_every")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate}: must be positive")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup={self.warmup}: must be a share of the steps in [0, 1)")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay={self.weight_decay}: must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm={self.clip_norm}: must be positive, or null for no limit")
        for name, kind in (("schedule", Schedule), ("precision", Precision), ("normalise", Normalise)):
            if getattr(self, name) not in (choices := get_args(kind)):
                raise InputError(f"{name}={getattr(self, name)}: choose one of {', '.join(choices)}")

    def of_influence(self) -> dict[str, Any]:
        """The settings that change the result, beyond the rounding of sums."""
        return {name: value for name, value in asdict(self).items() if name not in WITHOUT_INFLUENCE}

    @property
    def micro_batch(self) -> MicroBatchLimit:
        """The most that one forward pass of the training may hold."""
        return MicroBatchLimit(
            tokens=self.micro_batch_tokens, examples=self.micro_batch_size, packed=self.packing
        )

    @property
    def validation_batch(self) -> MicroBatchLimit:
        """The most that one forward pass of a validation may hold: padded, and without gradients."""
        return MicroBatchLimit(tokens=self.micro_batch_tokens, examples=self.micro_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints, besides on SIGTERM and SIGINT.

    Attributes:
        every_steps: steps between checkpoints; ``None``: not by steps.
        every_minutes: minutes between checkpoints; ``None``: not by time.
        keep_last: how many intact checkpoints to keep.
    """

    every_steps: int | None
    every_minutes: float | None
    keep_last: int

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: naming the key and its value.
        """
        _require_counts(self, "every_steps", "keep_last")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise InputError(f"every_minutes={self.every_minutes}: must be positive, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How and where to train.

    Attributes:
        fit: how to optimise.
        checkpoint: when to write to ``output_dir/checkpoints``; ``Fitted.write`` removes them.
        resume: ``auto`` continues from the newest intact checkpoint if there is one, ``never`` starts over.
        tracker: takes the metrics as they arise, besides ``metrics.jsonl``.
        output_dir: where everything goes.
        seed: of the order of examples and of dropout.
    """

    fit: FitConfig
    checkpoint: CheckpointConfig
    resume: Resume
    tracker: Tracker
    output_dir: Path
    seed: int


@contextmanager
def out_of_memory_help(
    model: torch.nn.Module, config: FitConfig, *, longest: int, processes: int
) -> Iterator[None]:
    """Turn a lack of memory, of the GPU or the CPU, into one line that names the settings to lower.

    Args:
        model: what is trained.
        config: how.
        longest: tokens of the longest example.
        processes: how many train together.

    Raises:
        RunError: the memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        advice = remedies(model, config, longest=longest, processes=processes)
        raise RunError(
            f"out of memory{f' (asked for {asked[1]} more)' if asked else ''}; "
            f"try in this order: {', '.join(advice)}"
        ) from error


def remedies(model: torch.nn.Module, config: FitConfig, *, longest: int, processes: int) -> list[str]:
    """Settings that take less memory than the present ones, the cheapest first.

    Args:
        model: what is trained.
        config: how.
        longest: tokens of the longest example, which always has to fit.
        processes: how many train together.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    frozen = [parameter for parameter in matrices if not parameter.requires_grad]
    found = []
    share = -(-config.batch_size // processes)
    most = longest * min(share, config.micro_batch_size or share)
    tokens = min(most, config.micro_batch_tokens or most)
    if tokens > longest:
        found.append(f"fit.micro_batch_tokens={max(longest, tokens // 2)}")
    if not config.gradient_checkpointing:
        found.append("fit.gradient_checkpointing=true")
    if config.precision == "fp32":
        found.append("fit.precision=bf16")
    if not frozen:
        found.append("tuning=lora")
    elif not is_quantized(model):
        if any(parameter.dtype == torch.float32 for parameter in frozen):
            found.append("backbone.dtype=bfloat16")
        found.append("backbone.quantization=4bit")
    return [*found, f"max_length={longest // 2}"]


def free_memory() -> int:
    """Bytes that this process can still take, of the GPU if there is one."""
    device = pick_device()
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def _require_counts(config: FitConfig | CheckpointConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
