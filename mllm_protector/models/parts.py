"""A trained part's folder, and the base under its adapter.

The folder is written whole or not at all. An adapter is worth nothing on other weights, and where their
shapes agree no error would tell: the scores are numbers all the same. So a training takes the fingerprint of
its base, and whoever loads the part compares.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector.errors import InputError
from mllm_protector.files import read_json, writing
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.guard_file import (
    ADAPTER_FILES,
    FILE_NAME,
    GuardFile,
    Kind,
    loaded_files,
    read_guard_file,
)
from mllm_protector.models.tiny import SETTINGS

log = logging.getLogger(__name__)

BLOCK, BLOCKS = 1 << 16, 256
"""Bytes of a block, and the most blocks that are read of one file."""

CONFIG = "config.json"

Part = tuple[str | Path, Kind]


def save_part(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    guard: GuardFile,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a trained part: standard weights and tokenizer, then ``guard.json``.

    ``weights`` is the model's state dict, where the model itself has only a share of it.
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


def add_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """The base with the folder's LoRA adapter on it.

    Raises:
        InputError: no adapter in safetensors format, or one for another base.
    """
    from peft import PeftModel

    adapter_weights(folder)
    with fitting(folder):
        adapted: torch.nn.Module = PeftModel.from_pretrained(model, folder)
    return adapted


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder's adapter, by their PEFT names.

    Raises:
        InputError: no adapter in safetensors format.
    """
    path = folder / ADAPTER_FILES[1]
    if not path.is_file():
        raise InputError(f"{path}: missing; the adapter was not saved in safetensors format")
    return load_file(path)


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises into one line.

    Raises:
        InputError: the folder's adapter does not fit its base.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder}: the adapter does not fit its base model ({reason})") from error


def fingerprint(folder: Path) -> str | None:
    """A sha256 over a base's configuration and weights, which identifies it.

    Of each file it takes name, size and 256 blocks of 64 KiB, spread evenly from the first byte to the last;
    a file of up to 16 MiB is read whole. Two models that were trained differently differ in all blocks. It
    does not prove that no single weight was changed between them, and it leaves out the tokenizer, which a
    part brings with it.

    ``None`` where ``config.json``, ``model.safetensors`` or a shard is missing.
    """
    names = ["model.safetensors"]  # which is what is loaded where there are shards beside it
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted({*read_json(index).get("weight_map", {}).values()})
    paths = [folder / name for name in (CONFIG, *names)]
    if not all(path.is_file() for path in paths):
        return None
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        steps = min(-(-size // BLOCK), BLOCKS)
        with path.open("rb") as file:
            for step in range(steps):
                file.seek(step * max(size - BLOCK, 0) // max(steps - 1, 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def provenance(backbone: Backbone) -> dict[str, Any]:
    """The fields of ``GuardFile`` about a base: ``base``, ``base_fingerprint`` and ``pretrained``.

    A folder is named by its full path; of a model from the hub the commit is named that was loaded.
    """
    folder = _files(backbone)
    found = backbone
    if folder is not None and Path(backbone.name).is_dir():
        found = replace(backbone, name=str(folder))
    elif folder is not None and re.fullmatch("[0-9a-f]{40}", folder.name):
        found = replace(backbone, revision=folder.name)
    return {
        "base": asdict(found),
        "base_fingerprint": None if folder is None else fingerprint(folder),
        "pretrained": folder is None or not (folder / SETTINGS).is_file(),
    }


def part_backbone(
    guard: GuardFile, folder: Path, base: str | None, *, trust_remote_code: bool = False
) -> Backbone:
    """What to load the weights from: the folder itself, or the base under an adapter or a probe.

    A checkpoint never says whether its code is trusted; whoever loads it does.

    Raises:
        InputError: as ``find_base``.
    """
    if guard.tuning != "full":
        return find_base(guard, folder, base, trust_remote_code=trust_remote_code)
    whole = replace(guard.backbone(), trust_remote_code=trust_remote_code)
    return replace(whole, name=str(folder), revision=None, dtype="float32")


def find_base(
    guard: GuardFile, folder: Path, base: str | None, *, trust_remote_code: bool = False
) -> Backbone:
    """The base of a part: where the user says, where it was at training, or near the part.

    Near means by any end of its old path, in the part's folder or a folder above: a tree that was moved or
    copied as a whole still works. A part without a fingerprint is only looked for where it was.

    Raises:
        InputError: ``base`` is another model, or the right one is not found.
    """
    recorded = replace(guard.backbone(), trust_remote_code=trust_remote_code)
    if base is not None:
        if not _may_be_base(base, guard):
            raise InputError(
                f"base={base}: is not the model that {folder} was trained on ({recorded.name}): its weights "
                f"or its {CONFIG} differ"
            )
        return replace(recorded, name=base, revision=None)
    files = _files(recorded)
    if guard.base_fingerprint is None or (files and fingerprint(files) == guard.base_fingerprint):
        return recorded
    others = []
    for near in _near(folder.resolve(), recorded.name):
        if (found := fingerprint(near)) == guard.base_fingerprint:
            log.info("%s: its base is taken from %s", folder, near)
            return replace(recorded, name=str(near), revision=None)
        others += [str(near)] if found else []
    if files is None and not Path(recorded.name).is_absolute():
        return recorded  # not here yet: the hub has it
    where = "another model" if files else "no such folder"
    also = f" (another model: {', '.join(others[:3])})" if others else ""
    raise InputError(
        f"{folder}: the base that it was trained on is not found. Looked at {recorded.name} ({where}) and, "
        f"by the ends of that path, in {folder.resolve()} and all folders above{also}; "
        "give base=<its folder>"
    )


def base_of(base: str | None, folder: str | Path, kind: Kind) -> str | None:
    """The ``base`` that a user gave for several parts, if this part may be on it; else ``None``."""
    guard = None if base is None else read_guard_file(Path(folder), kind)
    return base if guard and base and _may_be_base(base, guard) else None


def bases_of(base: str | None, *parts: Part) -> list[str | None]:
    """``base_of`` each of several parts; where it is the base of none, all get it, and refuse it."""
    fits = [base_of(base, folder, kind) for folder, kind in parts]
    return fits if any(fits) else [base] * len(parts)


def require_bases(base: str | None, *parts: Part) -> None:
    """Check the bases of parts that are loaded later.

    Raises:
        InputError: a folder does not hold what it should, or a base is another model or not found.
    """
    for (folder, kind), own in zip(parts, bases_of(base, *parts), strict=True):
        part_backbone(read_guard_file(Path(folder), kind), Path(folder), own)


def _may_be_base(name: str, guard: GuardFile) -> bool:
    """Whether a model may be the base of a part; it may where that cannot be told."""
    if guard.base_fingerprint is None:
        return True
    files = _files(replace(guard.backbone(), name=name, revision=None))
    found = None if files is None else fingerprint(files)
    return found == guard.base_fingerprint or (found is None and not Path(name).is_dir())


def _files(backbone: Backbone) -> Path | None:
    """The folder with the files of a model: the user's own, or what the hub's cache has."""
    if Path(backbone.name).is_dir():
        return Path(backbone.name).resolve()
    try:
        cached = try_to_load_from_cache(backbone.name, CONFIG, revision=backbone.revision)
    except HFValidationError:  # not a name on the hub: a folder that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _near(folder: Path, name: str) -> Iterator[Path]:
    """Folders in or above ``folder`` that are called like an end of the path ``name``, the nearest first."""
    path = Path(name)
    parts = path.relative_to(path.anchor).parts
    for parent in (folder, *folder.parents):
        for start in range(len(parts)):
            if (near := parent.joinpath(*parts[start:])).is_dir():
                yield near


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("mllm-protector", "torch", "transformers", "peft", "accelerate")}
