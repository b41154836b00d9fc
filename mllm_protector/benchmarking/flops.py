"""How many floating-point operations the work needs, and how many the machine can do.

Only what any implementation must compute is counted: no padding, the causal half of the attention, the head
at the positions that carry a target, and no gradient that nobody asked for (frozen weights, and whatever
lies before the first adapter). The last layer counts in full, although a detector reads one position of
it. Norms, activations and the embedding are left out, as is usual.
"""

import time
from collections.abc import Sequence

import torch

from mllm_protector.benchmarking.shape import RANK, Shape

MATMUL = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices by which the peak is measured."""


def forward_flops(shape: Shape, lengths: Sequence[int], *, head: int) -> int:
    """Of the body with its adapters on whole texts, and of the head at some positions.

    Args:
        shape: of the model.
        lengths: tokens of each text.
        head: operations of the head, for all its positions together.
    """
    tokens = sum(lengths)
    layer = 2 * tokens * (_input_side(shape) + _output_side(shape)) + 2 * tokens * _adapters(shape)
    return shape.layers * (layer + 2 * _attention(shape, lengths)) + head


def training_flops(shape: Shape, lengths: Sequence[int], *, head: int, head_trained: bool) -> int:
    """Of one forward and backward pass with frozen weights and adapters on queries and values.

    Args:
        shape: of the model.
        lengths: tokens of each text.
        head: operations of the head's forward pass, for all its positions together.
        head_trained: whether the head gets a gradient of its own.
    """
    tokens = sum(lengths)
    attention = _attention(shape, lengths)
    # A frozen matrix costs its forward pass once more, for the gradient of its input; an adapter twice.
    later = 2 * tokens * (_input_side(shape) + _output_side(shape)) + 4 * tokens * _adapters(shape)
    later += 4 * attention
    # Before the first adapters nothing learns: their input has no gradient, and the first keys have none.
    first = 2 * tokens * _output_side(shape) + 3 * attention
    first += 2 * tokens * (_adapters(shape) + RANK * (shape.hidden + _key_width(shape)))
    backward = first + (shape.layers - 1) * later
    return forward_flops(shape, lengths, head=head) + backward + head * (2 if head_trained else 1)


def generation_flops(shape: Shape, prompts: Sequence[int], read: int) -> int:
    """Of writing one token behind the other, nothing computed twice; as if all answers were equally long.

    Args:
        shape: of the model.
        prompts: tokens of each prompt.
        read: tokens that went through the model: the prompts, and all that was written but the last tokens.
    """
    written = read - sum(prompts)
    each = written // len(prompts)
    head = language_head(shape, written + len(prompts))
    return forward_flops(shape, [prompt + each for prompt in prompts], head=head)


def language_head(shape: Shape, targets: int) -> int:
    """Of the language-model head's forward pass at so many positions."""
    return 2 * targets * shape.hidden * shape.vocab


def score_head(shape: Shape, texts: int) -> int:
    """Of the detector's one output for so many texts."""
    return 2 * texts * shape.hidden


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """One large matrix product, in operations per second; the fastest of many is the device's peak.

    On a CPU these are CPU-seconds of all threads together, as the other figures are.
    """
    side = MATMUL[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    begun = _clock(device)
    left @ right
    return 2 * side**3 / (_clock(device) - begun)


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _key_width(shape: Shape) -> int:
    return shape.hidden // shape.heads * shape.kv_heads


def _input_side(shape: Shape) -> int:
    """Weights of a layer that read its input: queries, keys and values."""
    return shape.hidden * (shape.hidden + 2 * _key_width(shape))


def _output_side(shape: Shape) -> int:
    """Weights of a layer behind its attention."""
    return shape.hidden * shape.hidden + 3 * shape.hidden * shape.intermediate


def _adapters(shape: Shape) -> int:
    """Weights of the adapters on queries and values."""
    return RANK * (shape.hidden + shape.hidden) + RANK * (shape.hidden + _key_width(shape))


def _attention(shape: Shape, lengths: Sequence[int]) -> int:
    """One matrix product (scores, or sums of values): each token sees itself and those before it."""
    return shape.hidden * sum(length * (length + 1) for length in lengths)
