"""Scoring and rewriting, one text at a time or as the package does it."""

from collections.abc import Sequence
from typing import Any

import torch

from mllm_protector.benchmarking.meter import Meter, Reading
from mllm_protector.benchmarking.shape import Kind
from mllm_protector.data.batching import MicroBatchLimit
from mllm_protector.data.detoxifier_encoding import DetoxifierEncoder
from mllm_protector.data.encoding import DetectorEncoder, EncodedAnswer
from mllm_protector.models.detector import score_logits
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.records import AnswerPair


class Scoring:
    """The package's own scoring."""

    def __init__(
        self, model: torch.nn.Module, encoder: DetectorEncoder, meter: Meter, *, limit: MicroBatchLimit
    ) -> None:
        """Bind a model.

        Args:
            model: a classifier.
            encoder: pads its rows.
            meter: listens to it.
            limit: of one forward pass.
        """
        self._model, self._encoder, self._meter, self._limit = model, encoder, meter, limit

    def step(self, rows: Sequence[EncodedAnswer]) -> tuple[None, Reading]:
        """Score all rows."""
        self._meter.start()
        score_logits(self._model, self._encoder, [row.ids for row in rows], limit=self._limit)
        return None, self._meter.stop()


class Rewriting:
    """The package's own greedy decoding, on a model whose answers end."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: DetoxifierEncoder,
        meter: Meter,
        *,
        batch_size: int,
        new_tokens: int,
    ) -> None:
        """Bind a model.

        Args:
            model: a causal language model of random weights.
            encoder: renders the prompts.
            meter: listens to the model.
            batch_size: answers written at once.
            new_tokens: the longest answer; half of it is the mean.
        """
        end_some_answers(model, end_id=encoder.end_id, mean=new_tokens / 2)
        self._meter = meter
        self._detoxifier = Detoxifier(
            model,
            encoder,
            untrained_guard("detoxifier", encoder),
            max_new_tokens=new_tokens,
            batch_size=batch_size,
        )

    def step(self, rows: Sequence[AnswerPair]) -> tuple[None, Reading]:
        """Rewrite the rejected answer of each pair."""
        self._meter.start()
        self._detoxifier.correct(queries=[row.query for row in rows], answers=[row.rejected for row in rows])
        return None, self._meter.stop()


def end_some_answers(model: torch.nn.Module, *, end_id: int, mean: float) -> None:
    """Let a model of random weights, which would write on for ever, choose the end token now and then.

    Where it does depends on the highest logit alone, so an answer has the same length however it is batched;
    the lengths are spread like those of an event that is equally likely at each token.

    Args:
        model: a causal language model.
        end_id: of the end token.
        mean: tokens of an answer on average.
    """

    def end(head: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        ends = (logits.max(dim=-1).values.float() * 100).frac() < 1 / mean
        logits[..., end_id] = logits[..., end_id].masked_fill(ends, torch.finfo(logits.dtype).max)
        return logits

    model.get_output_embeddings().register_forward_hook(end)  # type: ignore[operator]


def untrained_guard(kind: Kind, encoder: DetectorEncoder | DetoxifierEncoder) -> GuardFile:
    """What a part of random weights says of itself."""
    return GuardFile(
        kind=kind,
        tuning="lora",
        base={"name": "random weights"},
        prompt=encoder.prompt,
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        data={},
        metrics={},
        versions={},
    )
