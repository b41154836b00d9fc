"""A training small enough to be checked by hand: a model that tags each token of a row.

Rows have different lengths and some tokens no label, so neither rows nor batches weigh the same. The
model has a buffer, as rotary embeddings do.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mllm_protector.data.encoding import IGNORED, Batch
from mllm_protector.models.backbone import inference
from mllm_protector.processes import Processes
from mllm_protector.training.checkpoints import Fitted
from mllm_protector.training.logging import NoTracker, Tracker
from mllm_protector.training.loop import Run, Task, Weights, fit
from mllm_protector.training.settings import CheckpointConfig, FitConfig, Resume

VOCABULARY, TAGS, WIDTH = 13, 3, 8
WEIGHTS = "model.safetensors"

Row = list[tuple[int, int]]
"""(token, tag or IGNORED)"""

CONFIG = FitConfig(
    epochs=2,
    max_steps=None,
    batch_size=8,
    micro_batch_tokens=None,
    micro_batch_size=None,
    packing=False,
    normalise="tokens",
    learning_rate=1e-2,
    schedule="linear",
    warmup=0.1,
    weight_decay=0.01,
    clip_norm=1.0,
    precision="fp32",
    gradient_checkpointing=False,
    compile=False,
    validate_every=None,
    best_metric="loss",
    log_every=1,
)

NO_CHECKPOINTS = CheckpointConfig(every_steps=None, every_minutes=None, keep_last=2)


class Tagger(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = torch.nn.Dropout(dropout)
        self.output = torch.nn.Linear(WIDTH, TAGS)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.dropout(torch.tanh(self.embedding(ids) * self.scale)))


def make_model(dropout: float = 0.0) -> Tagger:
    torch.manual_seed(0)
    return Tagger(dropout)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """The tag is the token modulo three, and every fourth token on average has none."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 9))]
        rows.append([(t, IGNORED if i and draw.random() < 0.25 else t % TAGS) for i, t in enumerate(tokens)])
    return rows


def collate(rows: Sequence[Row]) -> Batch:
    width = max(map(len, rows))
    padded = torch.tensor([row + [(0, IGNORED)] * (width - len(row)) for row in rows])
    ids, labels = padded.unbind(-1)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"]).float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def evaluate(model: torch.nn.Module, processes: Processes[float]) -> dict[str, float]:
    """Row by row, so that the processes have different numbers of forward passes."""
    rows = make_rows(7, seed=1)
    with inference(model):
        mine = [summed_loss(model, collate([row])).item() for row in processes.mine(rows)]
    return {"loss": sum(processes.gather(mine, len(rows)))}


def save(model: torch.nn.Module, target: Path, metrics: dict[str, float], state: Weights) -> None:
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / WEIGHTS)
    (target / "saved.json").write_text(json.dumps(metrics))


def run(
    folder: Path,
    *,
    count: int = 43,
    train: Sequence[Any] | None = None,
    collate: Callable[[Sequence[Any]], Batch] = collate,
    model: torch.nn.Module | None = None,
    loss_fn: Callable[[torch.nn.Module, Batch], torch.Tensor] = summed_loss,
    evaluate: Callable[[torch.nn.Module, Processes[Any]], dict[str, float]] = evaluate,
    save: Callable[[Any, Path, dict[str, float], Weights], None] = save,
    tracker: Tracker | None = None,
    checkpoint: CheckpointConfig = NO_CHECKPOINTS,
    resume: Resume = "auto",
    seed: int = 0,
    **changes: Any,
) -> Fitted:
    """Train, and save the weights and their metrics when ``fit`` asks for it."""
    trained = model or make_model()
    task = Task(
        model=trained,
        examples=make_rows(count) if train is None else train,
        collate=collate,
        loss=loss_fn,
        evaluate=evaluate,
        save=partial(save, trained),
        identity={"task": "tags"},
    )
    return fit(
        task,
        Run(
            fit=replace(CONFIG, **changes),
            checkpoint=checkpoint,
            resume=resume,
            tracker=tracker or NoTracker(),
            output_dir=folder,
            seed=seed,
        ),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]
