"""How to optimise: the settings of a training, checked."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.errors import InputError

Schedule = Literal["linear", "cosine", "constant_with_warmup"]
Precision = Literal["fp32", "bf16"]
Normalise = Literal["tokens", "examples"]


WITHOUT_INFLUENCE = (
    "micro_batch_tokens",
    "micro_batch_size",
    "packing",
    "gradient_checkpointing",
    "compile",
    "log_every",
)
"""Settings of memory, speed and words: a training may go on with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to optimise.

    What is learnt depends on ``batch_size``, not on how a step is divided: the ``micro_batch`` settings,
    ``packing``, ``gradient_checkpointing`` and the number of processes change memory and speed only, dropout
    included (``training.dropout``), but for that of attention weights.

    Attributes:
        epochs: passes over the training data.
        max_steps: stop after so many steps, whatever ``epochs`` says; ``None`` for no limit.
        batch_size: examples in one step, over all processes.
        micro_batch_tokens: positions in one forward pass of one process; ``None`` for no limit.
        micro_batch_size: examples in one forward pass of one process; ``None`` for no limit.
        packing: texts stand end to end, without padding; for decoders (Llama, Qwen, Mistral, ...).
        normalise: what the summed loss of a step is divided by: its target ``tokens``, or its ``examples`` as
            in the paper's formula. A detector has one target per example.
        learning_rate: the peak, reached after the warm-up.
        schedule: from the peak down: ``linear`` or ``cosine`` to zero, or ``constant_with_warmup``.
        warmup: share of all steps, in [0, 1).
        weight_decay: on matrices; biases and norms are never decayed.
        clip_norm: longest gradient, or ``None``.
        precision: ``bf16`` computes in bfloat16 with float32 weights, head and loss.
        gradient_checkpointing: compute activations again in the backward pass: a third more work, far less
            memory.
        compile: through ``torch.compile``, which takes a minute at the start.
        validate_every: steps between validations; ``None`` for once an epoch.
        best_metric: the figure by which the kept weights are chosen.
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
        """Refuse what cannot be.

        Raises:
            InputError: naming the key and its value.
        """
        counts = ("epochs", "max_steps", "batch_size", "micro_batch_tokens", "micro_batch_size")
        for name in (*counts, "validate_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
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
        """The settings on which the result depends, beyond the rounding of sums."""
        return {name: value for name, value in asdict(self).items() if name not in WITHOUT_INFLUENCE}

    @property
    def micro_batch(self) -> MicroBatchLimit:
        """The most that a forward pass of the training may hold."""
        return MicroBatchLimit(
            tokens=self.micro_batch_tokens, examples=self.micro_batch_size, packed=self.packing
        )

    @property
    def validation_batch(self) -> MicroBatchLimit:
        """The most that a forward pass of a validation may hold: padded, and without gradients."""
        return MicroBatchLimit(tokens=self.micro_batch_tokens, examples=self.micro_batch_size)
