"""The package's own training step (as ``training.loop.fit`` takes it), scoring and rewriting."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from mllm_protector.data.batching import MicroBatchLimit, pack_answers, pack_corrections, plan_epoch
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import Batch, DetectorEncoder, EncodedAnswer
from mllm_protector.models.detector import score_logits
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.packing import use_packed_attention
from mllm_protector.processes import start_accelerator
from mllm_protector.records import AnswerPair
from mllm_protector.training.losses import LanguageLoss, detector_loss
from mllm_protector.training.parallel import Objective, micro_batches, prepare, take_step
from speed.meter import Meter, Reading
from speed.plain import CLIP_NORM, adamw
from speed.shape import Precision

SHARED = (PartialState, AcceleratorState, GradientState)
"""accelerate keeps one precision and one plan of accumulation for a whole process."""


class Packed:
    """Training on all rows of a round, packed without padding."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetectorEncoder | DetoxifierEncoder,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
        micro_batch_tokens: int,
    ) -> None:
        """Bind a model, which is trained in place."""
        self._meter = meter
        self._limit = MicroBatchLimit(tokens=micro_batch_tokens, packed=True)
        use_packed_attention(model)
        scores = isinstance(encoder, DetectorEncoder)
        self._collate: Callable[..., Batch] = pack_answers if scores else pack_corrections
        objective = Objective(model, detector_loss if scores else LanguageLoss(model))
        model.train()
        with accelerate_holding([{} for _ in SHARED]):
            self._accelerator = start_accelerator(precision)
            self._shared = prepare(self._accelerator, objective, lambda module: adamw(module, learning_rate))
            self._state = [dict(kind._shared_state) for kind in SHARED]

    def step(self, rows: Sequence[Any]) -> Reading:
        """One optimisation step."""
        with accelerate_holding(self._state):
            self._meter.start()
            lengths = [len(row) for row in rows]
            plans = plan_epoch(lengths, batch_size=len(rows), limit=self._limit, processes=1, seed=0, epoch=1)
            batches = micro_batches(next(iter(plans)), 0, rows, self._collate, seed=0, step=1)
            result = take_step(self._accelerator, self._shared, batches, CLIP_NORM, "tokens")
            return self._meter.stop(result.loss)


@contextmanager
def accelerate_holding(state: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Inside, accelerate holds this state: arms of two precisions, and TRL's, take turns."""

    def hold(held: Sequence[dict[str, Any]]) -> None:
        for kind, each in zip(SHARED, held, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(each)

    before = [dict(kind._shared_state) for kind in SHARED]
    hold(state)
    try:
        yield
    finally:
        hold(before)


class Timed:
    """Work without a loss."""

    def __init__(self, meter: Meter, work: Callable[[Any], object]) -> None:
        """Bind work to the meter of its model."""
        self._meter, self._work = meter, work

    def step(self, rows: Any) -> Reading:
        """Do it on the rows of a round."""
        self._meter.start()
        self._work(rows)
        return self._meter.stop()


def scorer(
    model: torch.nn.Module, encoder: DetectorEncoder, limit: MicroBatchLimit
) -> Callable[[Sequence[EncodedAnswer]], object]:
    """The package's own scoring, with a limit for one forward pass."""
    return lambda rows: score_logits(model, encoder, [row.ids for row in rows], limit=limit)


def rewriter(
    model: torch.nn.Module, encoder: DetoxifierEncoder, *, batch_size: int, new_tokens: int
) -> Callable[[Sequence[AnswerPair]], object]:
    """The package's own greedy decoding; half of ``new_tokens``, the longest answer, is the mean."""
    end_some_answers(model, end_id=encoder.end_id, mean=new_tokens / 2)
    guard = GuardFile(
        kind="detoxifier",
        tuning="lora",
        base={"name": "random weights"},
        prompt=encoder.prompt,
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        data={},
        metrics={},
        versions={},
    )
    part = Detoxifier(model, encoder, guard, max_new_tokens=new_tokens, batch_size=batch_size)
    return lambda rows: part.correct(
        queries=[row.query for row in rows], answers=[row.rejected for row in rows]
    )


def end_some_answers(model: torch.nn.Module, *, end_id: int, mean: float) -> None:
    """Let a model of random weights, which would write on for ever, choose the end token now and then.

    Whether it does depends on the highest logit alone, so an answer has the same length however it is
    batched; ``mean`` is the mean length in tokens.
    """

    def end(head: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        ends = (logits.max(dim=-1).values.float() * 100).frac() < 1 / mean
        logits[..., end_id] = logits[..., end_id].masked_fill(ends, torch.finfo(logits.dtype).max)
        return logits

    model.get_output_embeddings().register_forward_hook(end)  # type: ignore[operator]
