"""Training as the official scripts do it: four pairs at a time in random order, padded, all logits.

Source: github.com/pipilurj/MLLM-protector, the two training scripts. Their ranking term and their doubled
BCE are left out, which cost nothing: the way through the model is what is timed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder
from mllm_protector.models.backbone import to_device
from speed.meter import Meter, Reading
from speed.shape import Precision

PAIRS = 4
"""In one forward pass."""

CLIP_NORM = 1.0
"""Of every arm."""


class OfficialLoop:
    """A backward pass after each forward pass, and one change of the weights."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetectorEncoder | DetoxifierEncoder,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
    ) -> None:
        """Bind a model, which is trained in place."""
        self._model, self._encoder, self._meter, self._precision = model, encoder, meter, precision
        self._optimizer = adamw(model, learning_rate)

    def step(self, rows: Sequence[Any]) -> Reading:
        """One optimisation step."""
        self._meter.start()
        total = torch.zeros((), device=next(self._model.parameters()).device)
        scores = isinstance(self._encoder, DetectorEncoder)
        for loss in self._detector(rows) if scores else self._detoxifier(rows):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._meter.stop(float(total))

    def _detector(self, rows: Sequence[Any]) -> Iterator[torch.Tensor]:
        """Two forward passes for each batch of pairs: the accepted answers, then the rejected ones."""
        for start in range(0, len(rows), 2 * PAIRS):
            losses = []
            for side in (0, 1):
                batch = to_device(self._encoder(rows[start + side : start + 2 * PAIRS : 2]), self._model)
                labels = batch.pop("labels")
                with autocast(self._model, self._precision):
                    logits = self._model(**batch, use_cache=False).logits[:, 0].float()
                losses.append(
                    torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
                )
            yield (losses[0] + losses[1]) / len(rows)

    def _detoxifier(self, rows: Sequence[Any]) -> Iterator[torch.Tensor]:
        """Hugging Face's own loss over the logits of every position."""
        targets = sum(len(row.target) for row in rows)
        for start in range(0, len(rows), PAIRS):
            batch = to_device(self._encoder(rows[start : start + PAIRS]), self._model)
            with autocast(self._model, self._precision):
                yield self._model(**batch, use_cache=False, num_items_in_batch=targets).loss


def adamw(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of every arm."""
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def autocast(model: torch.nn.Module, precision: Precision) -> AbstractContextManager[None]:
    """Compute in bfloat16 if asked."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")
