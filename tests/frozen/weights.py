"""What short trainings end with: packed, padded, LoRA, in two processes, and resumed after a kill."""

import hashlib
import importlib
import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tqdm import tqdm

from tests.frozen.scripts import train
from tests.frozen.stored import machine
from tests.killing import Group

SHORT = ("fit.max_steps=14", "fit.validate_every=6")
LORA = ("tuning=lora", "tuning.rank=4", "tuning.dropout=0.1")
WAYS = {
    "packed": (),
    "padded": ("fit.packing=false",),
    "lora": LORA,
    "two processes": LORA,
    "resumed": (*LORA, "checkpoint.every_steps=3"),
}
PARTS = ("detector", "detoxifier")
SLOW_TO_IMPORT = (
    "transformers.models.llama.modeling_llama",
    "mllm_protector.training.detector",
    "mllm_protector.training.detoxifier",
)
"""Imported once, before any training is forked."""


def compute(home: Path) -> dict[str, Any]:
    """For each part and way the weights' digest, sums and norms, and the figures of the validation."""
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)
    tqdm.set_lock(threading.RLock())  # by itself a semaphore that a killed process would never give back
    return {
        "made_on": machine(),
        "trainings": {
            f"{part}, {way}": _trained(part, way, home / f"{part}-{way.replace(' ', '-')}")
            for part in PARTS
            for way in WAYS
        },
    }


def _trained(part: str, way: str, folder: Path) -> dict[str, Any]:
    work = partial(train, part, folder, *SHORT, *WAYS[way])
    if way == "resumed":
        checkpoints = folder / "checkpoints"
        assert Group(work, 1).end_or_kill(seconds=300, when=lambda: any(checkpoints.glob("step-*"))), (
            f"{part}: ended before it could be killed"
        )
        assert not (folder / "metrics.json").exists()
    assert not Group(work, 2 if way == "two processes" else 1).end_or_kill(seconds=300), f"{part}: hangs"
    found = _weights(folder) | {"figures": _figures(folder)}
    shutil.rmtree(folder)
    return found


def _weights(folder: Path) -> dict[str, Any]:
    digest, tensors = hashlib.sha256(), {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            double = tensor.double()
            tensors[name] = [double.sum().item(), double.norm().item()]
    return {"sha256": digest.hexdigest(), "tensors": tensors}


def _figures(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
