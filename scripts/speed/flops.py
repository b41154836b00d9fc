"""The floating-point operations that the work needs.

Only what any implementation must compute is counted: no padding, the causal half of the attention, the head
at positions with a target, and no gradient that nobody needs (of frozen weights, and before the first
adapter). Norms, activations and the embedding are left out, as is usual.
"""

from collections.abc import Sequence

from speed.shape import RANK, Shape


def forward_flops(shape: Shape, lengths: Sequence[int], *, head: int) -> int:
    """The forward pass of whole texts.

    Args:
        shape: of the model.
        lengths: tokens of each text.
        head: operations of the head, for all its positions together.
    """
    layer = 2 * sum(lengths) * (_weights(shape) + _adapters(shape)) + 2 * _attention(shape, lengths)
    return shape.layers * layer + head


def training_flops(shape: Shape, lengths: Sequence[int], *, head: int, head_trained: bool) -> int:
    """A forward and a backward pass with frozen weights and adapters on queries and values.

    Args:
        shape: of the model.
        lengths: tokens of each text.
        head: operations of the head's forward pass, for all its positions together.
        head_trained: whether the head gets a gradient.
    """
    tokens, attention = sum(lengths), _attention(shape, lengths)
    # A frozen matrix costs its forward pass once more, for the gradient of its input; an adapter twice.
    later = 2 * tokens * _weights(shape) + 4 * tokens * _adapters(shape) + 4 * attention
    # Before the first adapters nothing learns: their input has no gradient, and the first keys have none.
    behind = shape.hidden * shape.hidden + 3 * shape.hidden * shape.intermediate
    up = RANK * (shape.hidden + _key_width(shape))
    first = 2 * tokens * (behind + _adapters(shape) + up) + 3 * attention
    backward = first + (shape.layers - 1) * later
    return forward_flops(shape, lengths, head=head) + backward + head * (2 if head_trained else 1)


def generation_flops(shape: Shape, prompts: Sequence[int], read: int) -> int:
    """Writing token by token, nothing computed twice, as if all answers were equally long.

    Args:
        shape: of the model.
        prompts: tokens of each prompt.
        read: tokens that went through the model: the prompts, and all that was written but the last tokens.
    """
    written = read - sum(prompts)
    head = language_head(shape, written + len(prompts))
    return forward_flops(shape, [prompt + written // len(prompts) for prompt in prompts], head=head)


def language_head(shape: Shape, targets: int) -> int:
    """The forward pass of the language-model head at this many positions."""
    return 2 * targets * shape.hidden * shape.vocab


def score_head(shape: Shape, texts: int) -> int:
    """The forward pass of the detector's one output."""
    return 2 * texts * shape.hidden


def _key_width(shape: Shape) -> int:
    return shape.hidden // shape.heads * shape.kv_heads


def _weights(shape: Shape) -> int:
    """Frozen weights of a layer."""
    attention = 2 * shape.hidden * (shape.hidden + _key_width(shape))
    return attention + 3 * shape.hidden * shape.intermediate


def _adapters(shape: Shape) -> int:
    """Weights of a layer's adapters."""
    return RANK * (3 * shape.hidden + _key_width(shape))


def _attention(shape: Shape, lengths: Sequence[int]) -> int:
    """One matrix product (scores, or sums of values): each token sees itself and those before it."""
    return shape.hidden * sum(length * (length + 1) for length in lengths)
