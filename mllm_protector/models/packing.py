"""Running a backbone on packed rows: texts end to end, where each text sees only itself.

The attention is registered with transformers under its own name, so that any model written for its attention
interface can use it. On a GPU in half precision PyTorch's variable-length kernel does it in one call;
elsewhere each text is computed on its own, which costs nothing: no position is padding, and no large mask is
made.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mllm_protector.data.batching import BORDERS, is_packed, pack
from mllm_protector.data.encoding import Batch
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import inference, to_device

NAME = "within_texts"
HALF = (torch.float16, torch.bfloat16)

CHECKED_TEXTS = ([5, 6, 7, 8, 9], [6, 5, 9, 7], [8])
"""Ids that any vocabulary has; what they mean does not matter."""
TOLERANCE = 0.05
"""Of the norm. Texts that see each other differ by far more, bfloat16 by less."""


def use_packed_attention(model: torch.nn.Module) -> None:
    """Let a model read packed rows, and check that it reads each text as if it were alone.

    Padded rows it reads as before. A model that runs FlashAttention keeps it: that knows the borders itself.

    Raises:
        InputError: the model lets packed texts see each other, or does not take packed rows at all.
    """
    inner = pretrained(model)
    kind = inner.config.model_type
    if "flash" not in str(inner.config._attn_implementation):
        if not inner._can_set_attn_implementation():
            raise _refusal(f"{kind} cannot read packed texts")
        AttentionInterface.register(NAME, attend_within_texts)
        AttentionMaskInterface.register(NAME, _mask)
        inner.set_attn_implementation(NAME)
    try:
        difference = _difference(model)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refusal(f"{kind} cannot read packed texts ({error})") from error
    if not difference < TOLERANCE:
        raise _refusal(f"{kind} lets packed texts see each other (by {difference:.0%})")


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The output of a model's body at every position of a padded or packed batch; (B, T, hidden)."""
    output = body(model)(**model_inputs(batch), use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model's forward takes of a batch: everything but the labels."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if is_packed(batch):
        borders = inputs.pop(BORDERS)
        longest = int(borders.diff().max())
        borders = borders.to(batch["input_ids"].device)
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs


def packed_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """A sequence classifier's logits at the last token of each text of a packed row; (S, labels).

    Raises:
        InputError: a classifier that does not read the last token.
    """
    head: Any = getattr(pretrained(model), "score", None)
    if head is None:
        raise _refusal(f"{pretrained(model).config.model_type} does not judge by the last token")
    ends = batch[BORDERS][1:].long() - 1
    return head(hidden_states(model, batch)[0, ends.to(batch["input_ids"].device)])  # type: ignore[no-any-return]


def body(model: torch.nn.Module) -> torch.nn.Module:
    """What is in front of a model's head."""
    return pretrained(model).base_model  # type: ignore[no-any-return]


def pretrained(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, without what PEFT puts around it (its adapters stay in it)."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


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
    """An attention function as transformers calls it: to (1, T, H, D), and no weights.

    ``query`` is (1, H, T, D), ``key`` and ``value`` are (1, K, T, D), where K divides H. ``cu_seq_lens_q``,
    (S + 1,) int32, are the borders of the texts; without it the rows are padded and go through PyTorch's
    usual attention. ``sliding_window`` is how far back a position sees, itself included.

    Raises:
        InputError: the layer asks for soft capping or attention sinks, which are not done here.
    """
    if cu_seq_lens_q is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return padded
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise _refusal(f"this model's attention has {name}")
    causal = bool(getattr(module, "is_causal", True))
    window = sliding_window if causal and sliding_window and sliding_window < max_length_q else None
    kernel = _kernel() if query.is_cuda and query.dtype in HALF and dropout == 0.0 else None
    if kernel is None:
        return _text_by_text(query, key, value, cu_seq_lens_q, dropout, scaling, causal, window), None
    output = kernel(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, where this PyTorch has it with all that is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


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
        band, length = None, text_query.shape[2]
        if window is not None and window < length:
            # Each position sees itself and the ``window - 1`` before it.
            band = query.new_ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                text_query,
                repeat_kv(text_key, groups),
                repeat_kv(text_value, groups),
                attn_mask=band,
                dropout_p=dropout,
                scale=scaling,
                is_causal=causal and band is None,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _mask(
    *arguments: Any, attention_mask: torch.Tensor | None = None, **settings: Any
) -> torch.Tensor | None:
    """PyTorch's usual mask, but none for packed rows, where it would be large and is not used."""
    if attention_mask is None and not settings.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*arguments, attention_mask=attention_mask, **settings)  # type: ignore[no-any-return]


def _difference(model: torch.nn.Module) -> float:
    """How far packed texts are from the same texts alone, relative to their norm."""
    with inference(model):
        together, *alone = (
            hidden_states(model, to_device(pack(texts), model))[0].float()
            for texts in ([*CHECKED_TEXTS], *([ids] for ids in CHECKED_TEXTS))
        )
    apart = torch.cat(alone)
    return float((together - apart).norm() / apart.norm())


def _refusal(reason: str) -> InputError:
    return InputError(f"fit.packing=true: {reason}; use fit.packing=false")
