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
    """The size of a Llama.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads; they divide ``hidden``.
        kv_heads: heads of keys and values; they divide ``heads``.
        intermediate: width of the feed-forward part.
        vocab: rows of the embedding and of the language-model head.
        dtype: of the frozen weights; with ``bfloat16`` everything computes in it.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what is no Llama.

        Raises:
            InputError: naming the key and its value.
        """
        for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.hidden % self.heads:
            raise InputError(f"heads={self.heads}: must divide hidden={self.hidden}")
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype}: use {' or '.join(DTYPES)}")

    def build(self, kind: Kind, *, pad_id: int, end_id: int, positions: int, seed: int) -> torch.nn.Module:
        """A model with fresh adapters, on the GPU if there is one.

        Args:
            kind: with one output, or with a language-model head.
            pad_id: by which a classifier finds the last token of a row.
            end_id: of the end token.
            positions: the longest row.
            seed: of the weights.
        """
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
    """Makes copies that share the frozen weights: each has its own adapters and its own settings."""
    frozen = [tensor for tensor in model.parameters() if not tensor.requires_grad]
    return lambda: deepcopy(model, {id(tensor): tensor for tensor in frozen})


def round_frozen(model: torch.nn.Module) -> None:
    """Give a model frozen weights of its own in bfloat16; what is trained stays in float32."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if not tensor.requires_grad:
                setattr(module, name, torch.nn.Parameter(tensor.bfloat16(), requires_grad=False))
