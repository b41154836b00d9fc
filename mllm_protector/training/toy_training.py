"""The training of the toy MLLM."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.encoding import Batch, EncodedCorrection, collate_targets
from mllm_protector.data.tokens import encode_texts
from mllm_protector.data.toy import ToyTurn
from mllm_protector.models.mllm import HuggingFaceMLLM, load_mllm
from mllm_protector.models.tiny import save_tiny_llava
from mllm_protector.processes import Processes
from mllm_protector.training.logging import NoTracker
from mllm_protector.training.loop import Run, Task, Weights, fit
from mllm_protector.training.losses import LanguageLoss, mean_loss
from mllm_protector.training.settings import CheckpointConfig, FitConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedTurn(EncodedCorrection):
    """A prompt with its image tokens, the answer's ids, and the image (1, 3, H, W) if any."""

    pixels: torch.Tensor | None = None


def train(
    folder: Path, turns: Sequence[ToyTurn], *, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """Train a tiny LLaVA on turns and save it, with its processor, to a folder."""
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
