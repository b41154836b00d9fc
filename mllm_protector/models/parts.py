"""A trained part's folder: written whole or not at all, and an adapter put back on its base."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector.errors import InputError
from mllm_protector.files import writing
from mllm_protector.models.guard_file import ADAPTER_FILES, FILE_NAME, GuardFile, loaded_files


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
    """A folder to write a trained part to, whose files replace an earlier part's once all are on the disk.

    Raises:
        RunError: it cannot be written; the earlier part is as it was.
    """
    fresh = folder / ".saving"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with writing(str(folder)):
            fresh.mkdir(parents=True)
            yield fresh
            # Files that only an earlier part had go too: transformers would load an adapter that lies there.
            earlier = loaded_files(folder) if (folder / FILE_NAME).is_file() else []
            for name in (*earlier, *ADAPTER_FILES, FILE_NAME):
                (folder / name).unlink(missing_ok=True)
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == FILE_NAME):
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def part_saver(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, guard: GuardFile
) -> Callable[[Path, dict[str, float], dict[str, torch.Tensor]], None]:
    """``save_part`` for a training: takes a folder, validation metrics, and the weights."""

    def save(folder: Path, metrics: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        save_part(model, tokenizer, replace(guard, metrics=metrics), folder, weights)

    return save


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
