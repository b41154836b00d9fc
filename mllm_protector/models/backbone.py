"""Pretrained models from a folder or the hub.

Only safetensors are loaded, and code that comes with a model runs only if the user asks for it.
"""

import logging
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mllm_protector.data.batching import moved
from mllm_protector.errors import InputError
from mllm_protector.models.tuning import Quantization, is_quantized, keep_trainable, quantization_settings

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "auto"]
DTYPES = ("float32", "bfloat16")

FASTER = 1.3
"""How many times as fast a product of bfloat16 matrices must be on a CPU for bfloat16 to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """Where a pretrained model is and how it is loaded.

    Attributes:
        name: a local folder, or else a name on the Hugging Face hub.
        revision: the commit to take from the hub; pin it, hub contents change.
        dtype: of the loaded weights, one of ``DTYPES``, or ``auto`` for ``fast_dtype``. What is trained is
            kept in float32.
        attention: transformers' ``attn_implementation``; ``None`` lets transformers choose.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.
        quantization: ``8bit`` or ``4bit`` weights, on which only adapters can be trained; ``None`` for none.
    """

    name: str
    revision: str | None = None
    dtype: Dtype = "float32"
    attention: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", fast_dtype())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; an ``InputError`` if it cannot be loaded."""
        with loading(self.name):
            self._look_up()
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.name, **self._origin())
        return tokenizer

    def load_classifier(self, *, pad_id: int) -> tuple[PreTrainedModel, list[str]]:
        """The model with its last layer replaced by a linear layer with one output (paper, section 3).

        Args:
            pad_id: the id by which the model finds the last token of a row.

        Returns:
            The model, and the names of its new modules (not in the checkpoint): the head, in float32.

        Raises:
            InputError: the model cannot be loaded or quantised, or has no sequence classification
                form.
        """
        model, missing = self._load(AutoModelForSequenceClassification, num_labels=1)
        model.config.pad_token_id = pad_id
        model.config.id2label = {0: "HARMFUL"}
        model.config.label2id = {"HARMFUL": 0}
        model.config.problem_type = "multi_label_classification"  # transformers' name for BCE; never MSE
        fresh = sorted({key.rpartition(".")[0] for key in missing})
        for name in fresh:
            layer = model.get_submodule(name)
            if is_quantized(layer):
                raise InputError(
                    f"{self.name}: its new layer {name} cannot be kept out of the quantisation; "
                    "use backbone.quantization=null"
                )
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, Float32Linear.of(layer))
        return model, fresh

    def load_body(self) -> PreTrainedModel:
        """The model without a head.

        Raises:
            InputError: the model cannot be loaded, or a weight of it is not in the checkpoint.
        """
        model, missing = self._load(AutoModel)
        if lacking := [key for key in missing if "pooler" not in key]:  # which comes behind the blocks
            raise InputError(f"{self.name}: not a whole model, {lacking[0]} is missing")
        return model

    def load_causal_lm(self) -> PreTrainedModel:
        """The model with its own language-model head.

        Raises:
            InputError: the model cannot be loaded, or its head is not in the checkpoint.
        """
        model, missing = self._load(AutoModelForCausalLM)
        if missing:
            raise InputError(f"{self.name}: not a whole causal language model, {missing[0]} is missing")
        return model

    def _load(self, family: Any, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
        """A model of a transformers family, and the keys that its checkpoint lacks."""
        dtype = getattr(torch, self.dtype)
        if self.quantization is not None:
            settings["quantization_config"] = quantization_settings(
                self.quantization, dtype, classifier=family is AutoModelForSequenceClassification
            )
        with loading(self.name):
            self._look_up()
            model, report = family.from_pretrained(
                self.name,
                **self._origin(),
                dtype=dtype,
                attn_implementation=self.attention,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        keep_trainable(model)
        return model, sorted(report["missing_keys"])

    def _look_up(self) -> None:
        """Fail on a wrong name at once: each file costs some 20 seconds of retries where the hub is away."""
        if not Path(self.name).is_dir():
            AutoConfig.from_pretrained(self.name, **self._origin())

    def _origin(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32 whatever is around it: bfloat16 logits have three digits."""

    @classmethod
    def of(cls, layer: torch.nn.Linear) -> "Float32Linear":
        """The same layer in float32."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight, made.bias = layer.float().weight, layer.bias
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Map (..., in_features) of any dtype to (..., out_features) float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


@cache
def fast_dtype() -> str:
    """The faster one of ``DTYPES`` here: by what the GPU has, or on a CPU by a measured matrix product.

    Only some processors multiply bfloat16 fast (AVX512-BF16, AMX); on others it is slower than float32.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    seconds = {}
    for name in DTYPES:
        left, right = (torch.ones(shape, dtype=getattr(torch, name)) for shape in ((256, 1024), (1024, 1024)))
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begun)
        seconds[name] = min(times)
    ratio = seconds["float32"] / seconds["bfloat16"]
    log.info("a product of bfloat16 matrices takes %.1f times as long as one of float32", 1 / ratio)
    return "bfloat16" if ratio > FASTER else "float32"


def pick_device(device: str | None = None) -> torch.device:
    """The named device, or the GPU if there is one, or the CPU.

    Raises:
        InputError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise InputError(f"device={device}: cannot be used here ({_one_line(error)})") from error


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def to_device(batch: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A batch where the model is."""
    return moved(batch, device_of(model))


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; bfloat16 autocast where a bfloat16 backbone has float32 adapters."""
    was_training = model.training
    model.eval()
    mixed = {torch.bfloat16, torch.float32} <= {parameter.dtype for parameter in model.parameters()}
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device_of(model).type, dtype=torch.bfloat16, enabled=mixed),
        ):
            yield
    finally:
        model.train(was_training)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever stops a model from being loaded into one line, and keep transformers quiet.

    Its warnings are of new weights, such as the head that an adapter is about to fill; callers check whether
    any are missing in the end. ``name`` is a local folder or a name on the hub.

    Raises:
        InputError: for any exception inside.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the libraries raise many kinds on broken files
        problem = (
            "the folder cannot be loaded"
            if Path(name).exists()
            else "no such folder, and the hub does not give it; name a local folder or a model on the hub"
        )
        raise InputError(f"{name}: {problem} ({_one_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_whole(family: Any, name: str, what: str, *, dtype: str, **settings: Any) -> PreTrainedModel:
    """A model to run as it is: in safetensors format, with every weight from its checkpoint.

    Args:
        family: the transformers class that loads it.
        name: a local folder, or else a name on the Hugging Face hub.
        what: it is, in words.
        dtype: of the weights (``float32``, ``bfloat16``, ``float16``); ``auto`` takes the checkpoint's.
        settings: of ``from_pretrained``.

    Raises:
        InputError: an unknown dtype, or the model cannot be loaded, or a weight is missing.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype}: use auto, float32, bfloat16 or float16")
    with loading(name):
        model, report = family.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **settings
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name}: not a whole {what}, {missing[0]} is missing")
    return model


def require_length(model: PreTrainedModel, max_length: int) -> None:
    """Check that a backbone can read ``max_length`` tokens.

    Raises:
        InputError: it has fewer positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise InputError(f"max_length={max_length}: {model.config.model_type} has only {positions} positions")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), width=240, placeholder=" ...") or type(error).__name__
