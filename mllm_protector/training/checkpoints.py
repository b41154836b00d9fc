"""Checkpoints on the disk: files, whatever is in them.

A checkpoint is a folder such as ``step-00000120``: tensors in safetensors, the rest in JSON, and a manifest
with the size and sha256 of each file. It is written under a temporary name and renamed when all of it is on
the disk, so a killed run never leaves half of one.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_protector.errors import RunError
from mllm_protector.files import file_digest

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The name of their folder in a training's output folder."""

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-\d{8,}(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint.

    Attributes:
        folder: where it is.
        step: steps done.
        state: the JSON beside the tensors.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of ``<stem>.safetensors``, on the CPU; read from the disk when used.

        Raises:
            RunError: the file cannot be read by this process.
        """
        path = self.folder / f"{stem}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path}: cannot be read ({error}); output_dir must be visible to every process"
            ) from error


class Checkpoints:
    """The checkpoints of one training, in one folder. Only one process may write."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        """Open nothing yet; keep ``keep_last`` intact checkpoints."""
        self.folder = folder
        self.keep_last = keep_last
        self._damaged: set[Path] = set()

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove the ones it makes superfluous.

        It replaces one of the same step. Those of later steps, left by a run that resumed from an earlier
        one, are removed too.

        Args:
            step: steps done.
            tensors: by the stem of their file; no two may share memory.
            state: JSON.

        Raises:
            RunError: the disk is full or cannot be written to. Earlier checkpoints are untouched.
        """
        content = json.dumps(state, allow_nan=False)
        temporary = self.folder / f".{_name(step)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            temporary.mkdir()
            for stem, named in tensors.items():
                save_file(
                    {key: each.contiguous() for key, each in named.items()}, temporary / f"{stem}.safetensors"
                )
            (temporary / STATE).write_text(content, encoding="utf-8")
            files = {path.name: _measure(path) for path in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(_manifest(step, files), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                _flush(path)
            target = temporary.rename(self._free_name(step))
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"{self.folder}: the checkpoint of step {step} cannot be written ({error}); make room or "
                "choose another output_dir; earlier checkpoints are untouched"
            ) from error
        self._remove_superfluous(target)

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint (every byte is checked); ``None`` if there are none at all.

        Raises:
            RunError: there are some, but none is intact.
        """
        found = self._found()
        for folder in found:
            try:
                _verify(folder, contents=True)
                return Checkpoint(folder, _step(folder), json.loads((folder / STATE).read_bytes()))
            except (OSError, ValueError) as error:
                self._damaged.add(folder)
                log.warning("%s: damaged (%s); looking for an earlier checkpoint", folder, error)
        if found:
            raise RunError(
                f"{self.folder}: no checkpoint is intact; put back a copy of one, "
                "or give resume=never to start over"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints.

        Raises:
            RunError: one cannot be removed.
        """
        for folder in reversed(self._found()):  # until the last is gone, the newest is left
            _remove(folder)
        self._remove_leftovers()
        if found := self._found():
            raise RunError(f"{found[0]}: cannot be removed; remove it by hand")
        with suppress(OSError):  # missing, or somebody else keeps something in it
            self.folder.rmdir()

    def _found(self) -> list[Path]:
        """All folders with a checkpoint's name, newest first; of one step the last written first."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in entries if NAME.fullmatch(path.name)), key=_order, reverse=True)

    def _free_name(self, step: int) -> Path:
        """A folder cannot be replaced atomically, so a second checkpoint of a step gets a number."""
        taken = [_order(folder)[1] for folder in self._found() if _step(folder) == step]
        return self.folder / (f"{_name(step)}.{max(taken) + 1}" if taken else _name(step))

    def _remove_superfluous(self, newest: Path) -> None:
        found = self._found()
        earlier = [each for each in found if _step(each) < _step(newest) and self._looks_intact(each)]
        keep = {newest, *earlier[: self.keep_last - 1]}
        for folder in found:
            if folder not in keep:
                _remove(folder)

    def _looks_intact(self, folder: Path) -> bool:
        try:
            _verify(folder, contents=False)
        except (OSError, ValueError):
            return False
        return folder not in self._damaged

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _order(folder: Path) -> tuple[int, int]:
    """(step, number among the checkpoints of that step), from a folder's name."""
    step, _, number = folder.name.removeprefix("step-").partition(".")
    return int(step), int(number or 1)


def _step(folder: Path) -> int:
    return _order(folder)[0]


def _manifest(step: int, files: Any) -> str:
    return json.dumps({"schema": SCHEMA, "step": step, "files": files}, indent=1) + "\n"


def _measure(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _verify(folder: Path, *, contents: bool) -> None:
    """Compare a checkpoint with its manifest; without ``contents`` only the names and sizes of its files.

    Raises:
        ValueError: a file is not as written.
        OSError: a file cannot be read.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        files = json.loads(text)["files"]
        sizes = {name: file["size"] for name, file in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST}: not a manifest") from None
    if text != _manifest(_step(folder), files):
        raise ValueError(f"{MANIFEST}: not as written, or of another step or release")
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if different := sorted(found ^ sizes.keys()):
        raise ValueError(f"{different[0]}: {'unexpected' if different[0] in found else 'missing'}")
    for name, size in sizes.items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name}: {(folder / name).stat().st_size} bytes instead of {size}")
        if contents and _measure(folder / name) != files[name]:
            raise ValueError(f"{name}: its content changed")


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Hide a checkpoint, then remove it: a half-removed one must not look damaged."""
    try:
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", folder, error)
