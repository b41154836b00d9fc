"""How a training optimises, when it writes checkpoints, and what to lower if the memory runs out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.errors import RunError
from mllm_protector.models.backbone import fast_dtype
from mllm_protector.models.generating import is_out_of_memory
from mllm_protector.models.tuning import is_quantized
from mllm_protector.ranges import Count, Positive, Rate, Share

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
    """How to optimise; the options of ``fit`` say what each key means.

    The result depends on ``batch_size``, not on how a step is divided: the ``micro_batch`` settings,
    ``packing``, ``gradient_checkpointing`` and the number of processes change memory and speed only. That
    includes dropout (``training.dropout``), except dropout of attention weights.

    Attributes:
        normalise: divides the summed loss of a step by its target ``tokens``, or by its ``examples`` as in
            the paper's formula.
        weight_decay: of matrices; biases and norms are never decayed.
        precision: ``bf16`` computes in bfloat16 with float32 weights, head and loss; ``auto`` becomes the
            faster one (``models.backbone.fast_dtype``).
        best_metric: the validation metric that decides which weights are kept.
    """

    epochs: Count
    max_steps: Count | None
    batch_size: Count
    micro_batch_tokens: Count | None
    micro_batch_size: Count | None
    packing: bool
    normalise: Normalise
    learning_rate: Rate
    schedule: Literal["linear", "cosine", "constant_with_warmup"]
    warmup: Share
    weight_decay: Share
    clip_norm: Positive | None
    precision: Literal["fp32", "bf16", "auto"]
    gradient_checkpointing: bool
    compile: bool
    validate_every: Count | None
    best_metric: str
    log_every: Count

    def __post_init__(self) -> None:
        """Settle the precision."""
        if self.precision == "auto":
            fast = "bf16" if fast_dtype() == "bfloat16" else "fp32"
            object.__setattr__(self, "precision", fast)

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
        return replace(self.micro_batch, packed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints, besides on SIGTERM and SIGINT, and how many to keep."""

    every_steps: Count | None
    every_minutes: Positive | None
    keep_last: Count


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
    """Settings that take less memory than the present ones, the cheapest first."""
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
