"""What of a model is trained: every weight, or adapters on a frozen backbone, which may have 8 or 4 bits.

What is trained is in float32. Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314 (4 bits: normal floats
with quantised constants); LLM.int8, arXiv 2208.07339.
"""

import importlib.util
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mllm_protector.errors import InputError
from mllm_protector.ranges import Count, Rate, Share

# It warns at each multiplication that inputs are cast, and of CPU kernels that we do not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Task = Literal["SEQ_CLS", "CAUSAL_LM"]
TuningKind = Literal["full", "lora", "probe"]
Quantization = Literal["8bit", "4bit"]

HEADS = ("score", "classifier", "classification_head", "pooler", "summary", "logits_proj")
"""What transformers calls the layers that a classifier adds to a language model, or parts of these names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTuning:
    """Every weight is trained, in float32."""

    kind: TuningKind = "full"

    def prepare(self, model: PreTrainedModel, task: Task, fresh: Sequence[str]) -> torch.nn.Module:
        """The same model in float32; see ``LoraTuning.prepare``.

        Raises:
            InputError: it is quantised; such weights cannot be trained.
        """
        if is_quantized(model):
            raise InputError(
                "tuning=full: the weights of a quantised backbone cannot be trained; "
                "use tuning=lora or backbone.quantization=null"
            )
        return model.float()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTuning:
    """Low-rank adapters (and the new head) are trained in float32; the backbone is frozen.

    Attributes:
        rank: of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: on the adapters' input, during training only.
        targets: names of the layers that get adapters, or ``all-linear``.
        blocks: how many of the topmost transformer blocks get adapters; no gradient is computed below them,
            which saves time in proportion. ``None`` for all.
        precompute: compute what enters these blocks once, before the training (``models.precomputed``). For a
            detector, and for data whose hidden states fit on the disk.
    """

    rank: Count
    alpha: Count
    dropout: Share
    targets: str | list[str]
    blocks: Count | None = None
    precompute: bool = False
    kind: TuningKind = "lora"

    def __post_init__(self) -> None:
        """Refuse to precompute what changes."""
        if self.precompute and self.blocks is None:
            raise InputError("tuning.precompute=true: needs frozen blocks below; give tuning.blocks")

    def prepare(self, model: PreTrainedModel, task: Task, fresh: Sequence[str]) -> torch.nn.Module:
        """The model wrapped by PEFT, with gradients switched on exactly where it learns.

        Modules in ``fresh`` have no pretrained weights and are trained in full.

        Raises:
            InputError: the model has no layers of the names in ``targets``, or fewer blocks.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=task,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if self.blocks is None else self._within_blocks(model, self.blocks),
            modules_to_save=list(fresh) or None,
        )
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"tuning.targets={self.targets}: {str(error).splitlines()[0]}") from None
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted  # type: ignore[no-any-return]

    def _within_blocks(self, model: PreTrainedModel, count: int) -> str:
        """A regular expression for the full names of the target layers in the topmost blocks."""
        name, blocks = blocks_of(model)
        if count > len(blocks):
            raise InputError(f"tuning.blocks={count}: the model has only {len(blocks)}")
        linear = {
            each.rpartition(".")[2]
            for each, module in blocks.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        wanted = sorted(linear) if self.targets == "all-linear" else self.targets
        leaves = [wanted] if isinstance(wanted, str) else [re.escape(leaf) for leaf in wanted]
        numbers = "|".join(map(str, range(len(blocks) - count, len(blocks))))
        return rf"{re.escape(name)}\.(?:{numbers})\.(?:.*\.)?(?:{'|'.join(leaves)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTuning:
    """Nothing of the backbone is trained: one linear layer learns to read it (``models.probe``).

    Attributes:
        depths: which blocks are read, as shares of the backbone's depth.
        strengths: of the regularisation, the C of scikit-learn's ``LogisticRegression`` on standardised
            states: the smaller, the simpler. The best one on the validation answers is kept.
    """

    depths: Sequence[Share]
    strengths: Sequence[Rate]
    kind: TuningKind = "probe"

    def __post_init__(self) -> None:
        """Refuse to read nothing."""
        for name in ("depths", "strengths"):
            if not getattr(self, name):
                raise InputError(f"tuning.{name}: is empty; give at least one")

    def blocks(self, count: int) -> list[int]:
        """The blocks that are read of ``count``, from 1, each once."""
        return sorted({max(1, round(depth * count)) for depth in self.depths})


Tuning = FullTuning | LoraTuning
"""How weights are trained by gradients."""


def quantization_settings(quantization: Quantization, dtype: torch.dtype, *, classifier: bool) -> Any:
    """What transformers needs to know in order to quantise a model while it loads it.

    Args:
        quantization: bits of a weight.
        dtype: what the layers compute in. Packed 4-bit weights are in tensors of it, too: FSDP shards only
            floating tensors, and of one dtype.
        classifier: leave out the layers that a classifier adds, as transformers leaves out an LM's head.

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


def blocks_of(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The full name of a model's stack of transformer blocks, and the stack.

    Raises:
        InputError: it has none, or an encoder's and a decoder's.
    """
    config: Any = model.config
    count = None if config.is_encoder_decoder else config.get_text_config().num_hidden_layers
    for name, each in model.named_modules():
        if isinstance(each, torch.nn.ModuleList) and len(each) == count:
            return name, each
    raise InputError("tuning.blocks: this model is not one stack of transformer blocks; use null")


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
