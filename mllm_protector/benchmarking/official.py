"""Training as the official scripts do it: four pairs at a time in random order, padded, all logits.

Source: github.com/pipilurj/MLLM-protector, the two training scripts. Their ranking term and their doubled
BCE are left out, which cost nothing: what is timed is the way through the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch

from mllm_protector.benchmarking.meter import Meter, Reading
from mllm_protector.benchmarking.shape import Precision
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import Batch, DetectorEncoder, EncodedAnswer, EncodedCorrection
from mllm_protector.models.backbone import to_device

E = TypeVar("E")
R = TypeVar("R")

PAIRS = 4
"""In one forward pass."""

CLIP_NORM = 1.0
"""Of every arm."""


class _OfficialLoop(Generic[E, R]):
    """Some passes, each with its own backward pass, and one change of the weights."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: E,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
    ) -> None:
        """Bind a model, which is trained in place."""
        self._model, self._encoder, self._meter, self._precision = model, encoder, meter, precision
        self._optimizer = adamw(model, learning_rate)

    def step(self, rows: Sequence[R]) -> tuple[float, Reading]:
        """One optimisation step; its mean loss."""
        self._meter.start()
        total = torch.zeros((), device=next(self._model.parameters()).device)
        for loss in self._shares(rows):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        finish(self._model, self._optimizer)
        reading = self._meter.stop()
        return float(total), reading

    def _shares(self, rows: Sequence[R]) -> Iterator[torch.Tensor]:
        """Of each pass, what it adds to the mean loss."""
        raise NotImplementedError


class OfficialDetector(_OfficialLoop[DetectorEncoder, EncodedAnswer]):
    """Two forward passes for each batch of pairs: one over the accepted answers, one over the rejected."""

    def _shares(self, rows: Sequence[EncodedAnswer]) -> Iterator[torch.Tensor]:
        for start in range(0, len(rows), 2 * PAIRS):
            sides = [rows[start + side : start + 2 * PAIRS : 2] for side in (0, 1)]
            yield torch.stack([self._loss(self._encoder(side)) for side in sides]).sum() / len(rows)

    def _loss(self, batch: Batch) -> torch.Tensor:
        batch = to_device(batch, self._model)
        labels = batch.pop("labels")
        with autocast(self._model, self._precision):
            logits = self._model(**batch, use_cache=False).logits[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")


class OfficialDetoxifier(_OfficialLoop[DetoxifierEncoder, EncodedCorrection]):
    """Hugging Face's own loss over the logits of every position."""

    def _shares(self, rows: Sequence[EncodedCorrection]) -> Iterator[torch.Tensor]:
        targets = sum(len(row.target) for row in rows)
        for start in range(0, len(rows), PAIRS):
            batch = to_device(self._encoder(rows[start : start + PAIRS]), self._model)
            with autocast(self._model, self._precision):
                loss = self._model(**batch, use_cache=False, num_items_in_batch=targets).loss
            yield loss


def adamw(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of every arm, over what the model trains."""
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip, change the weights, forget the gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


def autocast(model: torch.nn.Module, precision: Precision) -> AbstractContextManager[None]:
    """Compute in bfloat16 if asked."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")
