"""Running a backbone on packed rows, and reading what it says at single positions."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mllm_protector.data.encoding import Batch
from mllm_protector.data.packing import BORDERS, is_packed, pack
from mllm_protector.errors import InputError
from mllm_protector.models import attention
from mllm_protector.models.backbone import inference, to_device

CHECKED_TEXTS = ([5, 6, 7, 8, 9], [6, 5, 9, 7], [8])
"""Ids that any vocabulary has; what they mean does not matter."""
TOLERANCE = 0.05
"""Of the norm. Texts that see each other differ by far more, bfloat16 by less."""


def use_packed_attention(model: torch.nn.Module) -> None:
    """Let a model read packed rows, and make sure that it reads each text as if it were alone.

    Padded rows it reads as before. A model that runs FlashAttention keeps it: that knows the borders itself.

    Args:
        model: a transformers model, or one wrapped by PEFT.

    Raises:
        InputError: the model lets packed texts see each other, or does not take packed rows at all.
    """
    inner = pretrained(model)
    kind = inner.config.model_type
    if "flash" not in str(inner.config._attn_implementation):
        if not inner._can_set_attn_implementation():
            raise InputError(f"fit.packing=true: {kind} cannot read packed texts; use fit.packing=false")
        inner.set_attn_implementation(attention.register())
    try:
        difference = _difference(model, CHECKED_TEXTS)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"fit.packing=true: {kind} cannot read packed texts ({error}); use fit.packing=false"
        ) from error
    if not difference < TOLERANCE:
        raise InputError(
            f"fit.packing=true: {kind} lets packed texts see each other (by {difference:.0%}); "
            "use fit.packing=false"
        )


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What a model's body says at every position, before its head; (B, T, hidden).

    Args:
        model: a transformers model with a head, or one wrapped by PEFT.
        batch: padded or packed; labels are not looked at.
    """
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
    ends = batch[BORDERS][1:].long() - 1
    last = hidden_states(model, batch)[0, ends.to(batch["input_ids"].device)]
    head: Any = getattr(pretrained(model), "score", None)
    if head is None:
        kind = pretrained(model).config.model_type
        raise InputError(f"fit.packing=true: {kind} does not judge by the last token; use fit.packing=false")
    return head(last)  # type: ignore[no-any-return]


def body(model: torch.nn.Module) -> torch.nn.Module:
    """What is in front of a model's head."""
    return pretrained(model).base_model  # type: ignore[no-any-return]


def pretrained(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, without what PEFT puts around it (its adapters stay in it)."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _difference(model: torch.nn.Module, texts: Sequence[list[int]]) -> float:
    with inference(model):
        together = hidden_states(model, to_device(pack(texts), model))[0].float()
        alone = torch.cat([hidden_states(model, to_device(pack([ids]), model))[0].float() for ids in texts])
    return float((together - alone).norm() / alone.norm())
