"""Attention that stays within each text of a packed row.

Registered with transformers under its own name, so that any model written for its attention interface can
use it. On a GPU in half precision PyTorch's variable-length kernel does it in one call; elsewhere each text
is computed on its own, which costs nothing: no position is padding, and no large mask is made.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mllm_protector.errors import InputError

NAME = "within_texts"
HALF = (torch.float16, torch.bfloat16)


def register() -> str:
    """Make the function known to transformers; returns the name to ask for it."""
    AttentionInterface.register(NAME, attend_within_texts)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def attend_within_texts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, T, D).
        key: (1, K, T, D), where K divides H.
        value: (1, K, T, D).
        attention_mask: of padded rows only.
        dropout: on the attention weights.
        scaling: of the scores; ``None`` for 1 / sqrt(D).
        cu_seq_lens_q: (S + 1,) int32, the borders of the texts; ``None`` for padded rows, which go through
            PyTorch's usual attention.
        max_length_q: the longest text.
        sliding_window: how far back a position sees, itself included; ``None`` for everything.
        others: what else the layer says.

    Returns:
        (1, T, H, D), and no weights.

    Raises:
        InputError: the layer asks for something that is not done here (soft capping, attention sinks).
    """
    if cu_seq_lens_q is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return padded
    _refuse_extras(others)
    causal = bool(getattr(module, "is_causal", True))
    window = sliding_window if causal and sliding_window and sliding_window < max_length_q else None
    kernel = _kernel() if query.is_cuda and query.dtype in HALF and dropout == 0.0 else None
    if kernel is not None:
        output = _one_call(kernel, query, key, value, cu_seq_lens_q, max_length_q, scaling, causal, window)
    else:
        output = _text_by_text(query, key, value, cu_seq_lens_q, dropout, scaling, causal, window)
    return output, None


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, where this PyTorch has it with all that is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def _one_call(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    output = kernel(
        *rows,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _text_by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    lengths = borders.diff().tolist()
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for text_query, text_key, text_value in parts:
        banded = window is not None and window < text_query.shape[2]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                text_query,
                repeat_kv(text_key, groups),
                repeat_kv(text_value, groups),
                attn_mask=_band(text_query.shape[2], window, query.device) if banded else None,
                dropout_p=dropout,
                scale=scaling,
                is_causal=causal and not banded,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(T, T) bool: each position sees itself and the ``window - 1`` before it."""
    positions = torch.arange(length, device=device)
    behind = positions[:, None] - positions[None, :]
    return (behind >= 0) & (behind < (window or length))


def _refuse_extras(others: Mapping[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise InputError(f"fit.packing=true: this model's attention has {name}; use fit.packing=false")


def _mask(
    *arguments: Any, attention_mask: torch.Tensor | None = None, **settings: Any
) -> torch.Tensor | None:
    """PyTorch's usual mask, but none for packed rows, where it would be large and is not looked at."""
    if attention_mask is None and not settings.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*arguments, attention_mask=attention_mask, **settings)  # type: ignore[no-any-return]
