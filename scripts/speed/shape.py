"""Llamas of random weights in any size: speed does not depend on what the weights say."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from mllm_protector.errors import InputError
from mllm_protector.models.backbone import DTYPES, Float32Linear
from mllm_protector.models.tuning import LoraTuning

Precision = Literal["fp32", "bf16"]
Kind = Literal["detector", "detoxifier"]

RANK = 8
ADAPTERS = LoraTuning(rank=RANK, alpha=2 * RANK, dropout=0.0, targets=["q_proj", "v_proj"])
"""What every arm trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a Llama: the keys of ``configs/model``; ``dtype`` is that of the frozen weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuse a size that no Llama has.

        Raises:
            InputError: naming the key and its value.
        """
        for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                raise InputError(f"model.{name}={number}: must be a whole number of at least 1")
        if self.hidden % self.heads:
            raise InputError(f"model.heads={self.heads}: must divide hidden={self.hidden}")
        if self.heads % self.kv_heads:
            raise InputError(f"model.kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype}: use {' or '.join(DTYPES)}")

    def build(self, kind: Kind, *, pad_id: int, end_id: int, positions: int, seed: int) -> torch.nn.Module:
        """A model with fresh adapters, on the GPU if there is one; ``positions`` is the longest row."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=positions,
            pad_token_id=pad_id,
            eos_token_id=end_id,
            num_labels=1,
            dtype=getattr(torch, self.dtype),
        )
        torch.manual_seed(seed)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            if kind == "detoxifier":
                model: PreTrainedModel = LlamaForCausalLM._from_config(config)
                return ADAPTERS.prepare(model, "CAUSAL_LM", [])
            model = LlamaForSequenceClassification._from_config(config)
            model.score = Float32Linear.of(model.score)
            return ADAPTERS.prepare(model, "SEQ_CLS", ["score"])


def copier(model: torch.nn.Module) -> Callable[[], torch.nn.Module]:
    """Makes copies that share the frozen weights; each has its own adapters."""
    frozen = [tensor for tensor in model.parameters() if not tensor.requires_grad]
    return lambda: deepcopy(model, {id(tensor): tensor for tensor in frozen})


def round_frozen(model: torch.nn.Module) -> None:
    """Give a model its own frozen weights in bfloat16; trained weights stay in float32."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if not tensor.requires_grad:
                setattr(module, name, torch.nn.Parameter(tensor.bfloat16(), requires_grad=False))
