"""What one pass through a transformer costs, from its layers and sizes: memory that it keeps, and FLOP.

Approximate: it knows decoder layers as most models have them (two norms, four attention tensors, a gated
feed-forward part), fused attention, and PEFT's adapters. What a model's config does not say counts as zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from mllm_protector.models.backbone import Float32Linear, pick_device
from mllm_protector.models.tuning import weight_count
from mllm_protector.training.cross_entropy import CHUNK_ELEMENTS

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""


class Sizes(NamedTuple):
    """Of a transformer: how many layers, and the widths between them, of all heads, and within them."""

    layers: int
    hidden: int
    attention: int
    intermediate: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Sizes":
        """Read from the model's config."""
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        hidden = getattr(text, "hidden_size", None) or 0
        head = getattr(text, "head_dim", None)
        return cls(
            layers=getattr(text, "num_hidden_layers", None) or 0,
            hidden=hidden,
            attention=head * text.num_attention_heads if head else hidden,
            intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        )


def activation_bytes(model: torch.nn.Module, tokens: int, *, bfloat16: bool, checkpointing: bool) -> int:
    """What the backward pass needs of a forward pass over ``tokens`` positions.

    Args:
        model: with gradients switched on where it learns.
        tokens: positions, padding included.
        bfloat16: computed under autocast.
        checkpointing: layers keep their input only and are computed again one at a time.
    """
    sizes = Sizes.of(model)
    stored = max((p.element_size() for p in model.parameters() if p.is_floating_point()), default=FLOAT32)
    width = BFLOAT16 if bfloat16 else FLOAT32
    norms = any(p.requires_grad for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name)
    # Norms compute in float32 whatever is around them, and keep their input, and their output if they learn.
    layer = 2 * sizes.hidden * FLOAT32 * (2 if norms else 1)
    layer += width * (4 * sizes.attention + 3 * sizes.intermediate)
    whole = sizes.layers * layer + _input_bytes(model, width)
    one = whole // max(1, sizes.layers)
    if checkpointing:
        return tokens * (sizes.layers * sizes.hidden * stored + 2 * one)
    return tokens * (whole + one)  # the layer that is going backward has its gradients beside


def cast_bytes(model: torch.nn.Module, *, checkpointing: bool) -> int:
    """What autocast adds: copies in bfloat16 of the float32 matrices, kept for the backward pass."""
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    copies = BFLOAT16 * sum(m.weight.numel() for m in layers if m.weight.dtype == torch.float32)
    return copies // max(1, Sizes.of(model).layers) if checkpointing else copies


def loss_bytes(model: torch.nn.Module, tokens: int) -> int:
    """The logits of one chunk with their gradient, and the gradient of a trained head while it is summed."""
    head = _head(model)
    if head is None:
        return 0
    weight = head.weight
    chunk = min(CHUNK_ELEMENTS, tokens * len(weight))
    return FLOAT32 * (2 * chunk + (weight.numel() if weight.requires_grad else 0))


def flops_per_token(model: torch.nn.Module, lengths: Sequence[int], *, checkpointing: bool) -> float:
    """FLOP to train on one token of texts of these lengths, forward and backward.

    A weight costs 2 forward, 2 for the gradient that passes through it and 2 for its own. Source:
    arXiv 2001.08361, section 2.1; attention over the causal half of the positions is added.
    """
    sizes = Sizes.of(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    embeddings -= {id(getattr(_head(model), "weight", None))}  # a tied one is multiplied with, too
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    weights = sum(map(weight_count, matrices))
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    seen = sum(length**2 for length in lengths) / sum(lengths) / 2
    attention = 4 * sizes.layers * sizes.attention * seen
    forward = 2 * weights + attention
    backward = 2 * weights + 2 * attention + 2 * trained
    return forward * (2 if checkpointing else 1) + backward


def _input_bytes(model: torch.nn.Module, width: int) -> int:
    """Of one position: the inputs that layers keep for the gradients of their weights or adapters.

    In float32, layers that read the same input keep it once; autocast and dropout make a copy for each.
    """
    total, seen = 0, set()
    mask = 1 if pick_device().type == "cuda" else FLOAT32
    for name, layer in _trained_layers(model):
        inputs = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features
        dropout = max(
            (getattr(each, "p", 0.0) for each in getattr(layer, "lora_dropout", {}).values()), default=0.0
        )
        if dropout > 0:
            total += inputs * (width + mask)
        elif width == BFLOAT16 or (name.rpartition(".")[0], inputs) not in seen:
            total += inputs * width
        seen.add((name.rpartition(".")[0], inputs))
    return total


def _trained_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of the body that have adapters, or weights that are trained."""
    head = _head(model)
    for name, layer in model.named_modules():
        if "lora_" in name or layer is head or isinstance(layer, Float32Linear):
            continue
        learns = isinstance(layer, torch.nn.Linear | Conv1D) and layer.weight.requires_grad
        if learns or len(getattr(layer, "lora_A", ())):
            yield name, layer


def _head(model: torch.nn.Module) -> Any:
    """A language model's last layer, or ``None``."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()
