"""A toy model to guard: a tiny LLaVA trained to fail in the way the paper describes.

It refuses most harmful requests that come as text and complies when an image comes with them: the paper's
finding in miniature, made on purpose. It demonstrates the pipeline and measures nothing.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.encoding import Batch, EncodedCorrection, collate_targets
from mllm_protector.data.tokens import encode_texts
from mllm_protector.data.toy import ToyTurn, mllm_turns
from mllm_protector.errors import InputError
from mllm_protector.files import content_key, read_json, write_json
from mllm_protector.models.mllm import HuggingFaceMLLM, load_mllm
from mllm_protector.models.tiny import save_tiny_llava
from mllm_protector.outputs import claimed
from mllm_protector.processes import Processes
from mllm_protector.ranges import Count, Rate, Seed
from mllm_protector.training.logging import NoTracker
from mllm_protector.training.loop import Run, Task, Weights, fit
from mllm_protector.training.losses import LanguageLoss, mean_loss
from mllm_protector.training.settings import CheckpointConfig, FitConfig

log = logging.getLogger(__name__)

NOTE = (
    "The MLLM is a toy: a tiny LLaVA that was trained here, on purpose, to comply with most harmful requests "
    "that come with an image and to refuse most of them as text. It shows the paper's finding in miniature; "
    "its numbers say nothing about any real model."
)
SETTINGS = "toy_mllm.json"


@dataclass(frozen=True, slots=True)
class EncodedTurn(EncodedCorrection):
    """A prompt with its image tokens, the answer's ids, and the image (1, 3, H, W) if any."""

    pixels: torch.Tensor | None = None


def toy_mllm(
    *, folder: str, epochs: Count, batch_size: Count, learning_rate: Rate, max_new_tokens: Count, seed: Seed
) -> HuggingFaceMLLM:
    """The toy MLLM from a folder, trained first if it is not there.

    ``learning_rate`` is the peak; ``max_new_tokens`` limits an answer, and the rest is about the training.

    Raises:
        InputError: the folder holds a toy MLLM of other settings, or files of somebody else, or several
            processes would train one.
    """
    path, turns = Path(folder), mllm_turns()
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    learnt = settings | {"turns": content_key([(turn.question.id, turn.answer) for turn in turns])}
    found = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
    if found and {name: found.get(name) for name in settings} != settings:
        raise InputError(
            f"{path}: holds a toy MLLM of other settings ({found}); remove it or choose another folder"
        )
    if found != learnt:  # none yet, or one that an earlier release taught other words
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"{path}: the toy MLLM is not there yet, and one process trains it: use python once"
            )
        with claimed(path, "toy_mllm", key="mllm.folder"):
            _train(path, turns, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
            write_json(path / SETTINGS, learnt)
    mllm = load_mllm(name=folder, batch_size=batch_size, max_new_tokens=max_new_tokens)
    mllm.source["note"] = NOTE
    return mllm


def _train(
    folder: Path, turns: Sequence[ToyTurn], *, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    untrained = save_tiny_llava(
        folder / "untrained",
        [text for turn in turns for text in (turn.question.text, turn.answer)],
        vocab_size=2048,
        hidden_size=128,
        layers=2,
        heads=4,
        image_size=32,
        patch_size=8,
        max_positions=512,
        seed=seed,
    )
    log.info("the toy MLLM is trained once and kept in %s", folder)
    mllm = load_mllm(name=str(untrained), batch_size=batch_size, max_new_tokens=1)
    rows = [_encode(mllm, turn) for turn in turns]
    held_out, train = rows[::16], [row for index, row in enumerate(rows) if index % 16]
    pad_id = mllm.processor.tokenizer.pad_token_id

    loss = LanguageLoss(mllm.model)
    limit = MicroBatchLimit(examples=batch_size)

    def collate(chosen: Sequence[EncodedTurn]) -> Batch:
        batch = collate_targets(chosen, pad_id)
        pixels = [row.pixels for row in chosen if row.pixels is not None]
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    def evaluate(model: torch.nn.Module, processes: Processes[Any]) -> dict[str, float]:
        return {"loss": mean_loss(model, loss, held_out, collate, processes, limit=limit)}

    def save(target: Path, metrics: dict[str, float], weights: Weights) -> None:
        mllm.model.save_pretrained(target, state_dict=weights)
        mllm.processor.save_pretrained(target)

    settings = FitConfig(
        epochs=epochs,
        max_steps=None,
        batch_size=batch_size,
        micro_batch_tokens=None,
        micro_batch_size=None,
        packing=False,
        normalise="tokens",
        learning_rate=learning_rate,
        schedule="linear",
        warmup=0.1,
        weight_decay=0.01,
        clip_norm=1.0,
        precision="fp32",
        gradient_checkpointing=False,
        compile=False,
        validate_every=None,
        best_metric="loss",
        log_every=10,
    )
    task = Task(
        model=mllm.model,
        examples=train,
        collate=collate,
        loss=loss,
        evaluate=evaluate,
        save=save,
        identity={},
    )
    never = CheckpointConfig(every_steps=None, every_minutes=None, keep_last=1)
    tracker = NoTracker()
    fit(
        task,
        Run(fit=settings, checkpoint=never, resume="never", tracker=tracker, output_dir=folder, seed=seed),
    )


def _encode(mllm: HuggingFaceMLLM, turn: ToyTurn) -> EncodedTurn:
    """A turn as the adapter itself would send it, with the answer behind it."""
    tokenizer = mllm.processor.tokenizer
    batch = mllm.encode([turn.question])
    [target] = encode_texts(tokenizer, [turn.answer])
    return EncodedTurn(
        batch["input_ids"][0].tolist(), [*target, tokenizer.eos_token_id], batch.get("pixel_values")
    )
