"""Where the base of a part is, and that it is the one that the part was trained on.

An adapter is worth nothing on other weights, and where their shapes agree nothing would tell: the scores are
numbers all the same. So a training takes the fingerprint of its base, and whoever loads the part compares.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from mllm_protector.errors import InputError
from mllm_protector.files import read_json
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.guard_file import GuardFile, Kind, read_guard_file
from mllm_protector.models.tiny import SETTINGS

log = logging.getLogger(__name__)

BLOCK, BLOCKS = 1 << 16, 256
"""Bytes that are read at a time, and how often at most in one file."""

CONFIG = "config.json"


def fingerprint(folder: Path) -> str | None:
    """By what a base is known again: a sha256 over its configuration and its weights.

    Of each file it takes name, size and 256 blocks of 64 KiB, spread evenly from the first byte to the last;
    a file of up to 16 MiB is read whole. Two models that were trained differently differ in all blocks. It
    does not prove that no single weight was changed between them, and it knows nothing of the tokenizer,
    which a part brings with it.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or shards and their index.

    Returns:
        64 hexadecimal digits; ``None`` if a file is missing.
    """
    names = ["model.safetensors"]  # which is what is loaded where there are shards beside it
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted({*read_json(index).get("weight_map", {}).values()})
    paths = [folder / CONFIG, *(folder / name for name in names)]
    if not all(path.is_file() for path in paths):
        return None
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        last = max(size - BLOCK, 0)
        steps = min(-(-size // BLOCK), BLOCKS)
        with path.open("rb") as file:
            for step in range(steps):
                file.seek(step * last // max(steps - 1, 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def provenance(backbone: Backbone) -> dict[str, Any]:
    """What ``guard.json`` says of a base: where it is, by what it is known again, whether it was trained.

    A folder is named by its full path, and of a model from the hub the commit is named that was loaded.
    """
    folder = _files(backbone)
    found = backbone
    if folder is not None and _is_local(backbone):
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
    """What to load the weights from: the folder itself, or the base under an adapter.

    A checkpoint never says whether its code is trusted; whoever loads it does.

    Raises:
        InputError: as ``find_base``.
    """
    if guard.tuning == "lora":
        return find_base(guard, folder, base, trust_remote_code=trust_remote_code)
    whole = replace(guard.backbone(), trust_remote_code=trust_remote_code)
    return replace(whole, name=str(folder), revision=None, dtype="float32")


def find_base(
    guard: GuardFile, folder: Path, base: str | None, *, trust_remote_code: bool = False
) -> Backbone:
    """The base of a part: where the user says, where it was at training, or near the part.

    Near means by any end of its old path, in the part's folder or a folder above: a tree that was moved or
    copied as a whole still works. A part without a fingerprint is only looked for where it was.

    Args:
        guard: of the part.
        folder: of the part.
        base: a folder or a name on the hub; ``None`` to look for it.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: ``base`` is another model, or the right one is nowhere.
    """
    recorded = replace(guard.backbone(), trust_remote_code=trust_remote_code)
    if base is not None:
        given = replace(recorded, name=base, revision=None)
        if not _is(given, guard):
            raise InputError(
                f"base={base}: is not the model that {folder} was trained on ({recorded.name}): its weights "
                f"or its {CONFIG} are others"
            )
        return given
    if guard.base_fingerprint is None:
        return recorded
    files = _files(recorded)
    if files is not None and fingerprint(files) == guard.base_fingerprint:
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
    """The ``base`` that a user gave for several parts, where this part may be on it; ``None`` otherwise.

    Raises:
        InputError: the folder does not hold what it should.
    """
    if base is None:
        return None
    guard = read_guard_file(Path(folder), kind)
    return base if _is(replace(guard.backbone(), name=base, revision=None), guard) else None


def bases_of(base: str | None, *parts: tuple[str | Path, Kind]) -> list[str | None]:
    """``base_of`` each of several parts; where it is the base of none, all get it, and refuse it."""
    fitting = [base_of(base, folder, kind) for folder, kind in parts]
    return fitting if any(fitting) else [base] * len(parts)


def require_bases(base: str | None, *parts: tuple[str | Path, Kind]) -> None:
    """Look for the bases of parts that are loaded later.

    Raises:
        InputError: a folder does not hold what it should, or a base is another model or nowhere.
    """
    for (folder, kind), own in zip(parts, bases_of(base, *parts), strict=True):
        part_backbone(read_guard_file(Path(folder), kind), Path(folder), own)


def _is(backbone: Backbone, guard: GuardFile) -> bool:
    """Whether this may be the base of a part; what cannot be told is so."""
    if guard.base_fingerprint is None:
        return True
    files = _files(backbone)
    found = None if files is None else fingerprint(files)
    return found == guard.base_fingerprint or (found is None and not _is_local(backbone))


def _is_local(backbone: Backbone) -> bool:
    return Path(backbone.name).is_dir()


def _files(backbone: Backbone) -> Path | None:
    """The folder with the files of a model: the user's own, or what the hub's cache has."""
    if _is_local(backbone):
        return Path(backbone.name).resolve()
    try:
        cached = try_to_load_from_cache(backbone.name, CONFIG, revision=backbone.revision)
    except HFValidationError:  # not a name on the hub: a folder that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _near(folder: Path, name: str) -> Iterator[Path]:
    """Folders in or above ``folder`` that are called as the end of a path, the nearest first."""
    parts = [part for part in Path(name).parts if part != Path(name).anchor]
    for parent in (folder, *folder.parents):
        for start in range(len(parts)):
            if (near := parent.joinpath(*parts[start:])).is_dir():
                yield near
