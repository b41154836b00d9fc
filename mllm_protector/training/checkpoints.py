"""Checkpoints on the disk: those to resume from, and the best weights.

A checkpoint is a folder such as ``step-00000120``: tensors in safetensors, the rest in JSON, and a manifest
with the size and sha256 of each file. It is written under a temporary name and renamed when all of it is on
the disk, so a killed run never leaves half of one.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm_protector.errors import InputError, RunError
from mllm_protector.files import file_digest, write_json, writing
from mllm_protector.metrics import HIGHER_IS_BETTER
from mllm_protector.training.curves import IMAGE, draw_training

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The name of their folder in a training's output folder."""

MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-\d{8,}")

Measured = tuple[dict[str, float], int]
"""Validation metrics, and the step at which they were measured."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint: its folder, the steps done, and the JSON beside the tensors."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of ``<stem>.safetensors``, on the CPU.

        Raises:
            RunError: this process cannot read the file.
        """
        path = self.folder / f"{stem}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path}: cannot be read ({error}); output_dir must be visible to every process"
            ) from error


class Checkpoints:
    """The checkpoints of one training, in one folder. One process looks for the newest, then writes."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._newest = 0

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint (every byte is checked); ``None`` if there is no checkpoint at all.

        Raises:
            RunError: there are some, but none is intact.
        """
        found = self._found()
        for folder in reversed(found):
            try:
                _verify(folder)
                state = json.loads((folder / STATE).read_bytes())
            except (OSError, ValueError) as error:
                log.warning("%s: damaged (%s); looking for an earlier checkpoint", folder, error)
            else:
                self._newest = _step(folder)
                return Checkpoint(folder, self._newest, state)
        if found:
            raise RunError(
                f"{self.folder}: no checkpoint is intact; put back a copy of one, "
                "or give resume=never to start over"
            )
        return None

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint of a later step than the newest, then remove the ones that it replaces.

        Args:
            step: steps done.
            tensors: by the stem of their file; no two may share memory.
            state: JSON.

        Raises:
            RunError: the disk is full or cannot be written to. Earlier checkpoints are untouched.
        """
        content = json.dumps(state, allow_nan=False)
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            for stem, named in tensors.items():
                save_file(
                    {key: each.contiguous() for key, each in named.items()}, temporary / f"{stem}.safetensors"
                )
            (temporary / STATE).write_text(content, encoding="utf-8")
            (temporary / MANIFEST).write_text(_manifest(temporary, step), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                _flush(path)
            for damaged in self._found():
                if _step(damaged) > self._newest:
                    _remove(damaged)
            temporary.rename(target)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"{self.folder}: the checkpoint of step {step} cannot be written ({error}); make room or "
                "choose another output_dir; earlier checkpoints are untouched"
            ) from error
        self._newest = step
        for superfluous in self._found()[: -self.keep_last]:
            _remove(superfluous)

    def clear(self) -> None:
        """Remove all checkpoints, the newest last.

        Raises:
            RunError: one cannot be removed.
        """
        for folder in self._found():
            _remove(folder)
        self._remove_leftovers()
        if found := self._found():
            raise RunError(f"{found[0]}: cannot be removed; remove it by hand")
        with suppress(OSError):  # missing, or somebody else keeps something in it
            self.folder.rmdir()

    def _found(self) -> list[Path]:
        """All folders with a checkpoint's name, the newest last."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in entries if NAME.fullmatch(path.name)), key=_step)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _manifest(folder: Path, step: int) -> str:
    """The size and the sha256 of each file but the manifest."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    return json.dumps({"schema": 1, "step": step, "files": files}, indent=1) + "\n"


def _verify(folder: Path) -> None:
    """Raise a ``ValueError`` or ``OSError`` if a checkpoint is not as it was written."""
    written, found = (folder / MANIFEST).read_text(encoding="utf-8"), _manifest(folder, _step(folder))
    if written != found:
        files = json.loads(found)["files"]
        changed = [name for name, file in files.items() if file["sha256"] not in written]
        raise ValueError(f"{', '.join(changed) or 'its list of files'}: not as written")


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


@dataclass(frozen=True, slots=True)
class Fitted:
    """The outcome of a training.

    Attributes:
        metrics: validation metrics of the best weights.
        step: at which they were measured.
        last_metrics: validation metrics at the end.
        steps: of the whole training.
    """

    metrics: dict[str, float]
    step: int
    last_metrics: dict[str, float]
    steps: int

    def write(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Write ``metrics.json`` and ``training.png`` on the first process; return the former's content.

        The best weights' metrics are at the top level, those of the last step under ``last``. The training
        is then complete, and its checkpoints are removed.
        """
        content = {**self.metrics, **more, "step": self.step, "steps": self.steps, "last": self.last_metrics}
        if PartialState().is_main_process:
            with writing(str(folder / IMAGE)):
                draw_training(folder / "metrics.jsonl", [*self.metrics], self.step)
            with writing(str(folder / "metrics.json")):
                write_json(folder / "metrics.json", content)
            Checkpoints(folder / CHECKPOINTS, keep_last=1).clear()
            files = f"metrics.json, metrics.jsonl, {IMAGE}"
            log.info("written: %s (weights of step %s, %s)", folder, self.step, files)
        return content


@dataclass(slots=True)
class BestCheckpoint:
    """Keeps the best weights in a folder, and at the end the last ones in ``last`` if they differ.

    Attributes:
        metric: decides which weights are the best.
        folder: where they go.
        save: writes the weights and their metrics; called on every process, as the weights may be sharded.
        best: metrics of the best weights, and their step.
        last: metrics of the last validation, and its step.
    """

    metric: str
    folder: Path
    save: Callable[[Path, dict[str, float]], None]
    best: Measured | None = None
    last: Measured | None = None

    @property
    def step(self) -> int:
        """Of the last validation; 0 before the first."""
        return self.last[1] if self.last else 0

    def state(self) -> dict[str, Measured | None]:
        """What a resumed training continues with."""
        return {"best": self.best, "last": self.last}

    def update(self, metrics: dict[str, float], step: int) -> None:
        """Save the weights if they are the best so far; of equals the first is kept.

        Raises:
            InputError: the metric is not among the metrics.
            RunError: the weights cannot be written.
        """
        require_metric(self.metric, metrics)
        self.last = (metrics, step)
        sign = 1.0 if self.metric in HIGHER_IS_BETTER else -1.0
        if self.best is None or sign * metrics[self.metric] > sign * self.best[0][self.metric]:
            self.best = (metrics, step)
            self._save(self.folder, self.best)

    def finish(self, steps: int) -> Fitted:
        """Save the last weights where they are not the best."""
        if self.best is None or self.last is None:
            raise RunError("the training ended without a validation")
        if self.last[1] != self.best[1]:
            self._save(self.folder / "last", self.last)
        return Fitted(self.best[0], self.best[1], self.last[0], steps)

    def _save(self, folder: Path, measured: Measured) -> None:
        metrics, step = measured
        with writing(f"{folder}: the weights of step {step}"):
            self.save(folder, metrics)


def require_metric(metric: str, known: Iterable[str]) -> None:
    """Check that ``fit.best_metric`` is one of the metrics that are measured."""
    if metric not in known:
        raise InputError(f"fit.best_metric={metric}: choose one of {', '.join(known)}")
