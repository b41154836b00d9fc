"""Pretrained models from a folder or the hub, and how much of them is trained.

Only safetensors are loaded, and code that comes with a model runs only if the user asks for it.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mllm_protector.data.packing import moved
from mllm_protector.errors import InputError
from mllm_protector.models.quantization import (
    Quantization,
    is_quantized,
    keep_trainable,
    quantization_settings,
)
from mllm_protector.ranges import Count, Share

Task = Literal["SEQ_CLS", "CAUSAL_LM"]
TuningKind = Literal["full", "lora"]

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """Where a pretrained model is and how it is loaded.

    Attributes:
        name: a local folder, or else a name on the Hugging Face hub.
        revision: the commit to take from the hub; pin it, hub contents change.
        dtype: of the loaded weights, one of ``DTYPES``. What is trained is kept in float32.
        attention: transformers' ``attn_implementation``; ``None`` lets transformers choose.
        trust_remote_code: run code that comes with the model. Leave it off unless you have read that code.
        quantization: ``8bit`` or ``4bit`` weights, on which only adapters can be trained; ``None`` for none.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        """Refuse what transformers would stumble over later.

        Raises:
            InputError: an unknown dtype or quantisation.
        """
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype}: use {' or '.join(DTYPES)}")
        if self.quantization not in (None, *get_args(Quantization)):
            raise InputError(
                f"quantization={self.quantization}: use {' or '.join(get_args(Quantization))}, or null"
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        with loading(self.name):
            self._look_up()
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.name, **self._origin())
        return tokenizer

    def load_classifier(self, *, pad_id: int) -> tuple[PreTrainedModel, list[str]]:
        """The model with its last layer replaced by a linear layer with one output (paper, section 3).

        Args:
            pad_id: the id by which the model finds the last token of a row.

        Returns:
            The model, and the names of its modules that are new (not in the checkpoint): the head. They are
            and compute in float32.

        Raises:
            InputError: the model cannot be loaded, or not in so few bits, or has no sequence classification
                form.
        """
        arguments = self._arguments(classifier=True)
        with loading(self.name):
            self._look_up()
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.name, num_labels=1, output_loading_info=True, **arguments
            )
        keep_trainable(model)
        model.config.pad_token_id = pad_id
        model.config.id2label = {0: "HARMFUL"}
        model.config.label2id = {"HARMFUL": 0}
        model.config.problem_type = "multi_label_classification"  # transformers' name for BCE; never MSE
        fresh = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
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

    def load_causal_lm(self) -> PreTrainedModel:
        """The model with its own language-model head.

        Raises:
            InputError: the model cannot be loaded, or its head is not in the checkpoint.
        """
        arguments = self._arguments(classifier=False)
        with loading(self.name):
            self._look_up()
            model, report = AutoModelForCausalLM.from_pretrained(
                self.name, output_loading_info=True, **arguments
            )
        keep_trainable(model)
        if missing := sorted(report["missing_keys"]):
            raise InputError(f"{self.name}: not a whole causal language model, {missing[0]} is missing")
        return model

    def _look_up(self) -> None:
        """Fail on a wrong name at once: each file costs some 20 seconds of retries where the hub is away."""
        if not Path(self.name).is_dir():
            AutoConfig.from_pretrained(self.name, **self._origin())

    def _origin(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _arguments(self, *, classifier: bool) -> dict[str, Any]:
        dtype = getattr(torch, self.dtype)
        arguments = {
            **self._origin(),
            "dtype": dtype,
            "attn_implementation": self.attention,
            "use_safetensors": True,
        }
        if self.quantization is not None:
            arguments["quantization_config"] = quantization_settings(
                self.quantization, dtype, classifier=classifier
            )
        return arguments


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


class Tuning(Protocol):
    """How much of a model is trained."""

    kind: TuningKind

    def prepare(self, model: PreTrainedModel, task: Task, fresh: Sequence[str]) -> torch.nn.Module:
        """The model to train, with gradients switched on exactly where it learns.

        Args:
            model: as loaded.
            task: what it is trained for.
            fresh: modules without pretrained weights, trained in full whatever else is.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTuning:
    """Every weight is trained, in float32."""

    kind: TuningKind = "full"

    def prepare(self, model: PreTrainedModel, task: Task, fresh: Sequence[str]) -> torch.nn.Module:
        """The same model in float32.

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
    """

    rank: Count
    alpha: Count
    dropout: Share
    targets: str | list[str]
    kind: TuningKind = "lora"

    def prepare(self, model: PreTrainedModel, task: Task, fresh: Sequence[str]) -> torch.nn.Module:
        """The model wrapped by PEFT."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=task,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
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

    It warns of weights that are new, such as the head that an adapter is about to fill; whether any are
    missing in the end is checked by the callers.

    Args:
        name: of the model, a local folder or a name on the hub.

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
