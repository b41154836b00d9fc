"""What a training will need, said before it starts: memory by its parts, and time.

Approximate: it knows the layers of a transformer, not those of each model. It takes one process that holds
all weights; where they are sharded, each process needs less.
"""

import heapq
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
import torch

from mllm_protector.models.backbone import pick_device
from mllm_protector.models.tuning import weight_count
from mllm_protector.training.footprint import (
    FLOAT32,
    activation_bytes,
    cast_bytes,
    flops_per_token,
    loss_bytes,
)
from mllm_protector.training.memory import remedies
from mllm_protector.training.settings import FitConfig

log = logging.getLogger(__name__)

UTILISATION = 0.5
"""Of the speed of a large matrix product; what well-built training reaches."""

CPU_GAPS = 1.8
"""On a CPU, what the C library's heap takes for tensors that come and go, by what they hold. With glibc 1.5
to 2.5 were measured, and over 4 with checkpointing; 1.0 where the
environment has MALLOC_MMAP_THRESHOLD_=65536."""

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one process will need at most, in bytes, and how long the run will take.

    Attributes:
        parameters: weights in the model.
        trainable: those that are trained.
        tokens: positions in the largest forward pass.
        weights: as they are stored, and their copies in bfloat16 where it is computed in that.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        activations: kept for the backward pass.
        loss: logits of one chunk, and the gradient of a trained head.
        available: free on the device now, with what this model's weights already take there.
        seconds: of optimisation, without validation.
        speed: measured here, of a large matrix product, in FLOP/s.
        advice: keys that would take less memory.
    """

    parameters: int
    trainable: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    available: int
    seconds: float
    speed: float
    advice: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most memory that is in use at any time."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    def __str__(self) -> str:
        """Two lines for the log."""
        parts = ", ".join(
            f"{name} {getattr(self, name) / GIB:.2f}"
            for name in ("weights", "gradients", "optimizer", "activations", "loss")
        )
        return (
            f"memory, estimated: {self.peak / GIB:.2f} GiB a process ({parts}) "
            f"at {self.tokens:,} tokens a pass; {self.available / GIB:.2f} GiB are there\n"
            f"time, estimated: {_duration(self.seconds)} of training, at {UTILISATION:.0%} of the "
            f"{self.speed / 1e12:.2g} TFLOP/s that a matrix product reaches here"
        )

    def report(self) -> None:
        """Log it, with a warning if the memory will not be enough."""
        for line in str(self).splitlines():
            log.info(line)
        if self.peak > self.available:
            log.warning(
                "the training probably does not fit into memory; try, the first first: %s",
                ", ".join(self.advice),
            )


def estimate(
    model: torch.nn.Module, *, lengths: Sequence[int], config: FitConfig, processes: int, steps: int
) -> Estimate:
    """Estimate one training. Nothing is changed and the model is not run.

    Args:
        model: as it will be trained, with gradients switched on where it learns.
        lengths: of the examples, in tokens.
        config: how it will be trained.
        processes: how many work together.
        steps: of optimisation.
    """
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    tokens = largest_pass(lengths, config, processes)
    bfloat16, checkpointing = config.precision == "bf16", config.gradient_checkpointing
    device = pick_device()
    speed = matmul_speed(device, torch.bfloat16 if bfloat16 else torch.float32)
    read = steps * config.batch_size * sum(lengths) / len(lengths) / processes
    gaps = CPU_GAPS if device.type == "cpu" else 1.0
    kept = activation_bytes(model, tokens, bfloat16=bfloat16, checkpointing=checkpointing)
    return Estimate(
        parameters=sum(map(weight_count, parameters)),
        trainable=trainable,
        tokens=tokens,
        weights=_bytes(parameters) + (cast_bytes(model, checkpointing=checkpointing) if bfloat16 else 0),
        gradients=FLOAT32 * trainable,
        optimizer=2 * FLOAT32 * trainable,
        activations=round(gaps * kept),
        loss=round(gaps * loss_bytes(model, tokens)),
        available=_free(device) + _bytes(p for p in parameters if p.device == device),
        seconds=read * flops_per_token(model, lengths, checkpointing=checkpointing) / (UTILISATION * speed),
        speed=speed,
        advice=tuple(remedies(model, config, longest=max(lengths), processes=processes)),
    )


def largest_pass(lengths: Sequence[int], config: FitConfig, processes: int) -> int:
    """The most positions, padding included, that one forward pass of one process can have."""
    share = -(-config.batch_size // processes)
    examples = min(share, config.micro_batch_size or share, len(lengths))
    longest = heapq.nlargest(examples, lengths)
    most = sum(longest) if config.packing else examples * longest[0]
    # An example that alone is over the limit gets a pass of its own.
    return max(longest[0], min(most, config.micro_batch_tokens or most))


def matmul_speed(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.1) -> float:
    """FLOP/s of a large matrix product, the best within about ``seconds``."""
    size = 4096 if device.type == "cuda" else 512
    own = torch.Generator(device).manual_seed(0)  # what is drawn later must not depend on this
    matrix = torch.rand(size, size, device=device, dtype=dtype, generator=own)
    _wait_for(matrix @ matrix)  # the first one also loads the library
    best, end = math.inf, time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        _wait_for(matrix @ matrix)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _wait_for(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def _free(device: torch.device) -> int:
    """Bytes that this process can still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def _bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
