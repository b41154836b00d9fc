"""``guard.json``: what a trained part says of itself, beside its weights.

The weights are in the standard Hugging Face or PEFT format and load with stock libraries. This file adds
what those do not keep: the prompt the part was trained with, its lengths, base, threshold and data, and
a sha256 of each weight file. It is written last, so a half-written folder never loads.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.files import file_digest, read_json, write_json, writing
from mllm_protector.models.backbone import Backbone
from mllm_protector.scaling import Scale

SCHEMA = 1
FILE_NAME = "guard.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

HARM_CONVENTION = "positive logit = harmful; score = sigmoid((logit + offset) / temperature) = P(harmful)"

MEASURED = (
    "threshold",
    "threshold_how",
    "group_thresholds",
    "temperature",
    "offset",
    "calibration",
    "metrics",
    "versions",
    "weights",
    "prompt_sha256",
)
"""What is only known when a part is saved."""

Kind = Literal["detector", "detoxifier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardFile:
    """The content of ``guard.json``.

    Attributes:
        kind: which part this is.
        tuning: ``full`` (the folder holds a whole model) or ``lora`` (an adapter on ``base``).
        base: the backbone the part was trained from.
        prompt: the template that renders its input; ``prompt_sha256`` guards it against edits.
        chat: the prompt goes through the tokenizer's chat template.
        joined: the prompt and the texts are tokenised in one piece, as the part was trained; special tokens
            inside a text stay words.
        max_length: the longest input in tokens.
        pad_id: the id that fills batches.
        threshold: scores at or above it are harmful; ``None`` for a detoxifier.
        threshold_how: how it was chosen, in one sentence.
        group_thresholds: of answers whose group (such as a scenario) is known: its name to its threshold.
        temperature: divides the logit and the offset; ``None`` for a detoxifier.
        offset: is added to the logit.
        calibration: for what, on what data and with what figures threshold and scale were chosen, and why
            they are these; ``None`` where nobody has.
        window: the most tokens of an answer that a detector reads at once; ``None`` for as many as fit.
        data: where the training data came from and what it was.
        metrics: validation figures of exactly these weights.
        weights: file name to sha256.
        versions: of the libraries that trained it.
    """

    kind: Kind
    tuning: str
    base: dict[str, Any]
    prompt: str
    max_length: int
    pad_id: int
    chat: bool = False
    joined: bool = False
    threshold: float | None = None
    threshold_how: str | None = None
    group_thresholds: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    offset: float = 0.0
    calibration: dict[str, Any] | None = None
    window: int | None = None
    data: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, str]
    weights: dict[str, str] = field(default_factory=dict)
    prompt_sha256: str = ""
    schema: int = SCHEMA
    harm_convention: str = HARM_CONVENTION

    def backbone(self) -> Backbone:
        """The base as it was loaded for training."""
        return Backbone(**self.base)

    @property
    def scale(self) -> Scale:
        """How a logit becomes a score."""
        return Scale(temperature=self.temperature or 1.0, offset=self.offset)

    def origin(self) -> dict[str, Any]:
        """All that is decided before the training: base, prompt, lengths, data."""
        return {name: value for name, value in asdict(self).items() if name not in MEASURED}

    def write(self, folder: Path) -> None:
        """Write ``guard.json``, hashing the weights that are in the folder now."""
        content = asdict(self) | {
            "weights": weight_hashes(folder),
            "prompt_sha256": prompts.template_hash(self.prompt),
        }
        write_json(folder / FILE_NAME, content)


def read_guard_file(folder: Path, kind: Kind) -> GuardFile:
    """Read and check ``guard.json``.

    Raises:
        InputError: no such folder or file, another kind or schema, an edited prompt, or weights that are not
            the ones it was written for.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train the {kind} first or give {kind}=<folder>")
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE_NAME}, so this is not a trained {kind}")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path}: not of schema {SCHEMA}; it was written by another release")
    if content.get("kind") != kind:
        raise InputError(f"{folder}: holds a {content.get('kind')}, but a {kind} is wanted")
    names = {each.name for each in fields(GuardFile)}
    try:
        guard = GuardFile(**{key: value for key, value in content.items() if key in names})
        guard.backbone()
    except TypeError as error:
        raise InputError(f"{path}: incomplete ({error})") from None
    if not isinstance(guard.prompt, str) or prompts.template_hash(guard.prompt) != guard.prompt_sha256:
        raise InputError(f"{path}: the prompt was edited; a trained part only knows its own prompt")
    if not guard.weights:
        raise InputError(f"{path}: names no weights; the part was saved without any in safetensors format")
    found = weight_hashes(folder)
    for name in sorted(found.keys() | guard.weights.keys()):
        if found.get(name) != guard.weights.get(name):
            state = "missing" if name not in found else "not a file that the part was saved with"
            raise InputError(f"{folder / name}: {state}; copy the checkpoint again or retrain")
    return guard


def save_part(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    guard: GuardFile,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a trained part: standard weights and tokenizer, then ``guard.json``.

    Args:
        model: a transformers model, or one wrapped by PEFT.
        tokenizer: goes beside it.
        guard: what the part says of itself.
        folder: made if it is not there.
        weights: the model's state dict, where the model itself has only a share of it.
    """
    with replaced_part(folder) as fresh:
        model.save_pretrained(fresh, state_dict=weights)  # type: ignore[operator]
        tokenizer.save_pretrained(fresh)
        guard.write(fresh)


@contextmanager
def replaced_part(folder: Path) -> Iterator[Path]:
    """A place to write a trained part to, which takes that of an earlier one when all is on the disk.

    Raises:
        RunError: it cannot be written; the earlier part is as it was.
    """
    fresh = folder / ".saving"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with writing(str(folder)):
            fresh.mkdir(parents=True)
            yield fresh
            # An adapter of an earlier run goes too: transformers would put it on whatever model is beside it.
            for name in (FILE_NAME, *ADAPTER_FILES):
                (folder / name).unlink(missing_ok=True)
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == FILE_NAME):
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def part_saver(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, guard: GuardFile
) -> Callable[[Path, dict[str, float], dict[str, torch.Tensor]], None]:
    """``save_part`` for a training: takes a folder, the weights' validation figures, and the weights."""

    def save(folder: Path, metrics: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        save_part(model, tokenizer, replace(guard, metrics=metrics), folder, weights)

    return save


def part_backbone(
    guard: GuardFile, folder: Path, base: str | None, *, trust_remote_code: bool = False
) -> Backbone:
    """What to load the weights from: the folder itself, or the base under an adapter.

    A checkpoint never says whether its code is trusted; whoever loads it does.
    """
    trained_on = replace(guard.backbone(), trust_remote_code=trust_remote_code)
    if guard.tuning == "full":
        return replace(trained_on, name=str(folder), revision=None, dtype="float32")
    return replace(trained_on, name=base, revision=None) if base else trained_on


def add_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """The base with the folder's LoRA adapter on it.

    Raises:
        InputError: no adapter in safetensors format, or one for another base.
    """
    from peft import PeftModel

    _adapter_weights(folder)
    try:
        adapted: torch.nn.Module = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder}: the adapter does not fit its base model ({reason})") from error
    return adapted


def not_in_adapter(folder: Path, modules: Sequence[str]) -> list[str]:
    """Those of the named modules for which the folder's adapter brings no weights.

    Raises:
        InputError: no adapter in safetensors format.
    """
    from safetensors import safe_open

    with safe_open(_adapter_weights(folder), framework="pt") as weights:
        keys = list(weights.keys())
    return [module for module in modules if not any(f".{module}." in key for key in keys)]


def _adapter_weights(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing; the adapter was not saved in safetensors format")
    return path


def weight_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every safetensors file directly in a folder."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("mllm-protector", "torch", "transformers", "peft", "accelerate")}
