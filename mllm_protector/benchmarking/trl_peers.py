"""TRL's trainers as peers: what a user would take instead.

Each round is one ``trainer.train()`` of one optimisation step, timed from its begin to its end, so that no
set-up is counted. Gradient checkpointing, which TRL switches on by default, is off for every arm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import gettempdir
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from mllm_protector.benchmarking.meter import Meter, Reading
from mllm_protector.benchmarking.official import CLIP_NORM, PAIRS, adamw
from mllm_protector.benchmarking.shape import Precision
from mllm_protector.data.encoding import IGNORED, EncodedAnswer, EncodedCorrection

MISSING = 'TRL is not installed, so its arms are left out; get it with: pip install -e ".[bench]"'


def available() -> bool:
    """Whether TRL can be imported."""
    from importlib.util import find_spec

    return find_spec("trl") is not None


class _Timing(TrainerCallback):  # type: ignore[misc]
    """Starts and stops a meter with the optimisation step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.reading: Reading | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the trainer before the first forward pass."""
        self._meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer behind ``optimizer.step``."""
        self.reading = self._meter.stop()


class _TrlPeer:
    """A model, and what every trainer of TRL is told of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
        by_length: bool = False,
    ) -> None:
        """Bind a model, which is trained in place; ``by_length`` batches rows of like length."""
        self._model, self._tokenizer, self._meter = model, tokenizer, meter
        self._precision = precision
        self._sampling = "group_by_length" if by_length else "random"
        self._optimizer = adamw(model, learning_rate)

    def _settings(self, rows: int, each: int) -> dict[str, Any]:
        settings = _settings(rows, each, self._precision)
        return settings | {"train_sampling_strategy": self._sampling, "remove_unused_columns": False}


class TrlReward(_TrlPeer):
    """``RewardTrainer``: both answers of four pairs in one padded batch, and a pairwise loss."""

    def step(self, rows: Sequence[EncodedAnswer]) -> tuple[float, Reading]:
        """One optimisation step; its mean loss over pairs, -log sigmoid(harmful - harmless)."""
        return _train(self.trainer(rows), self._meter)

    def trainer(self, rows: Sequence[EncodedAnswer]) -> Any:
        """A trainer that makes one step of all rows: harmless and harmful answer in turn."""
        from trl import RewardConfig, RewardTrainer

        pairs = [
            {
                "chosen_ids": harmful.ids,
                "rejected_ids": harmless.ids,
                "length": max(len(harmful.ids), len(harmless.ids)),
            }
            for harmless, harmful in zip(rows[::2], rows[1::2], strict=True)
        ]
        return RewardTrainer(
            model=self._model,
            args=RewardConfig(**self._settings(len(pairs), PAIRS), max_length=None),
            train_dataset=_dataset(pairs),
            processing_class=self._tokenizer,
            optimizers=(self._optimizer, _constant(self._optimizer)),
        )


class TrlSft(_TrlPeer):
    """``SFTTrainer`` with the loss on the completion only."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
        by_length: bool = False,
        packed_tokens: int | None,
        compact: bool,
    ) -> None:
        """Bind a model, which is trained in place.

        Args:
            model: a causal language model with adapters.
            tokenizer: of the texts.
            meter: listens to the model.
            precision: of the computation.
            learning_rate: constant.
            by_length: rows of like length stand in one batch.
            packed_tokens: length of a packed row, one in each pass; ``None`` for four padded rows in each.
            compact: off CUDA TRL computes the logits of every position, as it says for compilers that want
                fixed shapes; this forces the way that it goes on CUDA, labelled positions only.
        """
        super().__init__(
            model, tokenizer, meter, precision=precision, learning_rate=learning_rate, by_length=by_length
        )
        self._packed_tokens, self._compact = packed_tokens, compact

    def step(self, rows: Sequence[EncodedCorrection]) -> tuple[float, Reading]:
        """One optimisation step; its mean loss over target tokens."""
        with compaction(self._compact):
            return _train(self.trainer(rows), self._meter)

    def trainer(self, rows: Sequence[EncodedCorrection]) -> Any:
        """A trainer that makes one step of all rows."""
        from trl import SFTConfig, SFTTrainer

        dataset = _dataset(
            [
                {
                    "input_ids": row.prompt + row.target,
                    "labels": [IGNORED] * len(row.prompt) + row.target,
                    "length": len(row.prompt) + len(row.target),
                }
                for row in rows
            ]
        )
        each = PAIRS if self._packed_tokens is None else 1
        packing = {"packing": self._packed_tokens is not None, "max_length": self._packed_tokens}
        return SFTTrainer(
            model=self._model,
            args=SFTConfig(**self._settings(len(rows), each), **packing),
            train_dataset=dataset,
            processing_class=self._tokenizer,
            optimizers=(self._optimizer, _constant(self._optimizer)),
        )


@contextmanager
def compaction(forced: bool) -> Iterator[None]:
    """Inside, TRL's head leaves out the positions without a label on any device."""
    from trl.trainer import utils

    as_shipped = utils._use_triton
    if forced:
        utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = as_shipped


def _train(trainer: Any, meter: Meter) -> tuple[float, Reading]:
    timing = _Timing(meter)
    trainer.add_callback(timing)
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    if timing.reading is None:
        raise RuntimeError("TRL made no step")
    return loss, timing.reading


def _settings(rows: int, each: int, precision: Precision) -> dict[str, Any]:
    return {
        "output_dir": gettempdir(),  # nothing is written there
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": rows,  # at most so many passes: the end of the data ends the step
        "max_steps": 1,
        "bf16": precision == "bf16",
        "gradient_checkpointing": False,
        "max_grad_norm": CLIP_NORM,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


def _constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
