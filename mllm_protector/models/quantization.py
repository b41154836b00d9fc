"""Frozen backbones in 8 or 4 bits, through bitsandbytes; what is trained stays in float32 beside them.

Source: QLoRA, arXiv 2305.14314 (4 bits: normal floats with quantised constants); LLM.int8, arXiv 2208.07339.
"""

import importlib.util
import logging
import math
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from mllm_protector.errors import InputError

# It warns at each multiplication that inputs are cast, and of CPU kernels that we do not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Quantization = Literal["8bit", "4bit"]

HEADS = ("score", "classifier", "classification_head", "pooler", "summary", "logits_proj")
"""What transformers calls the layers that a classifier adds to a language model, or parts of these names."""


def quantization_settings(quantization: Quantization, dtype: torch.dtype, *, classifier: bool) -> Any:
    """What transformers needs to know in order to quantise a model while it loads it.

    Args:
        quantization: bits of a weight.
        dtype: what the layers compute in. The packed 4-bit weights are kept in tensors of it, too: FSDP
            shards only floating tensors, and of one dtype.
        classifier: leave out the layers that a classifier adds. (transformers itself leaves out the head of
            a causal language model.)

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f'backbone.quantization={quantization}: bitsandbytes is missing; pip install -e ".[quantize]"'
        )
    kept = [rf".*{head}" for head in HEADS] if classifier else None
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=kept,
    )


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a module, or any within it, is one of bitsandbytes' layers."""
    return any(type(part).__module__.startswith("bitsandbytes.") for part in module.modules())


def weight_count(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds; packed 4-bit ones are more than its elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep gradients right on CPUs with AVX512-BF16 after the model was run without them.

    There bitsandbytes repacks 4-bit weights at the first pass in evaluation mode, and no gradient flows back
    through repacked ones: all later training would be wrong, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
