"""A real training that is killed again and again and must end as if nothing had happened.

``python -m tests.training.kills --kills 20 --processes 2`` trains a tiny detector (LoRA with dropout, packed,
validations within and at the ends of epochs, a checkpoint every three steps) once undisturbed. Then it trains
as many more, each of them killed (SIGKILL to all its processes) at two moments drawn from the time of a whole
training, and compares what they leave behind.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from mllm_protector.training import loop
from mllm_protector.training.settings import CheckpointConfig
from tests.killing import Group
from tests.training import parts
from tests.training.parts import DATA, LORA, Given, save_base
from tests.training.tagger import CONFIG

SETTINGS: dict[str, Any] = {
    "data": Given(DATA.train[:15], DATA.validation),
    "tuning": LORA,
    "checkpoint": CheckpointConfig(every_steps=3, every_minutes=None, keep_last=2),
}
FIT = replace(CONFIG, epochs=4, micro_batch_tokens=200, packing=True, validate_every=5)
UNFINISHED = re.compile(r"\..*\.\d+\.tmp")
"""Of a file that a killed process was writing, beside its place."""

train_a_detector = partial(parts.train_a_detector, **SETTINGS, fit=replace(FIT, best_metric="auroc"))
train_a_detoxifier = partial(parts.train_a_detoxifier, **SETTINGS, fit=FIT)


def left_behind(folder: Path) -> dict[str, Any]:
    """All files of a training as sha256, and its metrics except the speed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not UNFINISHED.fullmatch(path.name)]
    left: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "metrics.jsonl"
    }
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    left["metrics"] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return left


def is_saving(folder: Path) -> bool:
    """Whether a killed training was writing weights or a checkpoint."""
    return (folder / ".saving").exists() or any((folder / "checkpoints").glob(".step-*"))


def is_complete(folder: Path) -> bool:
    """Whether a training has nothing left to do; it would start over."""
    return (folder / "metrics.json").exists() and not any((folder / "checkpoints").glob("step-*"))


def rehearse(folder: Path, base: Path) -> None:
    """Import what is imported late, which each child would do again; without a gradient.

    A fork of a process that has computed one cannot compute any.
    """

    class Enough(Exception):
        pass

    def step(*arguments: Any) -> None:
        arguments[1].optimizer.step()
        raise Enough

    own, loop.take_step = loop.take_step, step
    with suppress(Enough):
        train_a_detector(folder, base)
    loop.take_step = own
    AcceleratorState._reset_state(reset_partial_state=True)


def run(root: Path, *, kills: int, seed: int, processes: int) -> bool:
    """Print a summary; whether all was as it should be."""
    torch.set_num_threads(1)
    # By itself it is a semaphore that all forks share, and a killed one would never give back.
    tqdm.set_lock(threading.RLock())
    base = save_base(root / "base")
    rehearse(root / "rehearsal", base)

    def attempt(folder: Path, seconds: float = 600) -> bool:
        return Group(partial(train_a_detector, folder, base), processes).end_or_kill(seconds=seconds)

    begun = time.monotonic()
    assert not attempt(root / "whole")
    duration = time.monotonic() - begun
    expected = left_behind(root / "whole")
    draw = random.Random(seed)
    hits = saving = same = 0
    for number in range(kills):
        folder = root / str(number)
        for seconds in (draw.uniform(0, duration), draw.uniform(0, duration), 600):
            if not is_complete(folder) and attempt(folder, seconds):
                hits += 1
                saving += is_saving(folder)
        same += left_behind(folder) == expected
    sys.stdout.write(
        f"{same} of {kills} bit-identical, {hits} kills hit ({saving} while saving; "
        f"a whole training: {duration:.1f} s)\n"
    )
    return same == kills and hits >= kills / 4  # fewer if the machine was slower at first


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="trainings, each killed twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        sys.exit(not run(root, **vars(arguments)))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
