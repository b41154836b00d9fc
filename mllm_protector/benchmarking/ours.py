"""The package's own training step, as ``training.loop.fit`` takes it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from mllm_protector.benchmarking.meter import Meter, Reading
from mllm_protector.benchmarking.official import CLIP_NORM, adamw
from mllm_protector.benchmarking.shape import Precision
from mllm_protector.data.batching import MicroBatchLimit, plan_epoch
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import Batch, DetectorEncoder
from mllm_protector.data.packing import pack_answers, pack_corrections
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.processes import start_accelerator
from mllm_protector.training.losses import LanguageLoss, detector_loss
from mllm_protector.training.parallel import Objective, micro_batches, prepare, take_step


class Ours:
    """All rows of a round in passes of like length, or end to end."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetectorEncoder | DetoxifierEncoder,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
        micro_batch_tokens: int,
        packed: bool,
        seed: int,
    ) -> None:
        """Bind a model, which is trained in place.

        Args:
            model: a classifier or a causal language model with adapters.
            encoder: of the detector or of the detoxifier.
            meter: listens to the model.
            precision: of the computation.
            learning_rate: constant.
            micro_batch_tokens: positions in one forward pass.
            packed: end to end, without padding.
            seed: of the order.
        """
        self._meter, self._seed = meter, seed
        self._limit = MicroBatchLimit(tokens=micro_batch_tokens, packed=packed)
        if packed:
            use_packed_attention(model)
        scores = isinstance(encoder, DetectorEncoder)
        pack: Callable[..., Batch] = pack_answers if scores else pack_corrections
        self._collate: Callable[..., Batch] = pack if packed else encoder
        loss_fn = detector_loss if scores else LanguageLoss(model)
        model.train()
        with accelerate_holding(_NOTHING):
            self._accelerator = start_accelerator(precision)
            self._shared = prepare(
                self._accelerator,
                Objective(model, loss_fn),
                lambda objective: adamw(objective, learning_rate),
            )
            self._state = [dict(kind._shared_state) for kind in SHARED]

    def step(self, rows: Sequence[Any]) -> tuple[float, Reading]:
        """One optimisation step; its mean loss over targets."""
        with accelerate_holding(self._state):
            self._meter.start()
            [plan] = plan_epoch(
                [len(row) for row in rows],
                batch_size=len(rows),
                limit=self._limit,
                processes=1,
                seed=self._seed,
                epoch=1,
            )
            batches = micro_batches(plan, 0, rows, self._collate, seed=self._seed, step=1)
            result = take_step(self._accelerator, self._shared, batches, CLIP_NORM, "tokens")
            return result.loss, self._meter.stop()


SHARED = (PartialState, AcceleratorState, GradientState)
"""accelerate keeps one precision and one plan of accumulation for a whole process."""

_NOTHING: list[dict[str, Any]] = [{} for _ in SHARED]


@contextmanager
def accelerate_holding(state: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Inside, accelerate holds a state of its own: arms of two precisions, and TRL's, take turns."""
    before = [dict(kind._shared_state) for kind in SHARED]
    _hold(state)
    try:
        yield
    finally:
        _hold(before)


def _hold(state: Sequence[dict[str, Any]]) -> None:
    for kind, held in zip(SHARED, state, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(held)
