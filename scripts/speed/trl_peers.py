"""TRL's trainers as peers: what a user would take instead.

Each round is one ``trainer.train()`` of one optimisation step, timed from its begin to its end, so that no
set-up is counted. Gradient checkpointing, which TRL switches on by default, is off for every arm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from tempfile import gettempdir
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from mllm_protector.data.encoding import IGNORED, EncodedAnswer, EncodedCorrection
from speed.meter import Meter, Reading
from speed.plain import CLIP_NORM, PAIRS, adamw
from speed.shape import Precision

MISSING = 'TRL is not installed, so its arms are left out; get it with: pip install -e ".[bench]"'


def available() -> bool:
    """Whether TRL can be imported."""
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
        """Called by the trainer after ``optimizer.step``."""
        self.reading = self._meter.stop()


class TrlPeer:
    """``RewardTrainer`` (its loss is pairwise) or ``SFTTrainer`` (loss on the completion only).

    Off CUDA ``SFTTrainer`` computes the logits of every position; here it computes them at labelled positions
    only on every device, as it does on CUDA.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        meter: Meter,
        *,
        precision: Precision,
        learning_rate: float,
        by_length: bool,
        packed_tokens: int | None,
    ) -> None:
        """Bind a model, which is trained in place.

        Args:
            model: with adapters.
            tokenizer: of the texts.
            meter: listens to the model.
            precision: of the computation.
            learning_rate: constant.
            by_length: rows of similar length share a batch.
            packed_tokens: length of a packed row, one in each pass; ``None`` for four padded rows in each.
        """
        self._model, self._tokenizer, self._meter, self._precision = model, tokenizer, meter, precision
        self._sampling = "group_by_length" if by_length else "random"
        self._packed_tokens = packed_tokens
        self._optimizer = adamw(model, learning_rate)

    def step(self, rows: Sequence[Any]) -> Reading:
        """One optimisation step."""
        with compaction() if isinstance(rows[0], EncodedCorrection) else nullcontext():
            trainer = self.trainer(rows)
            timing = _Timing(self._meter)
            trainer.add_callback(timing)
            trainer.remove_callback(PrinterCallback)
            loss = trainer.train().training_loss
        if timing.reading is None:
            raise RuntimeError("TRL made no step")
        return replace(timing.reading, loss=loss)

    def trainer(self, rows: Sequence[EncodedAnswer] | Sequence[EncodedCorrection]) -> Any:
        """A trainer that makes one step of all rows; those of a detector are harmless and harmful in turn."""
        from datasets import Dataset, disable_progress_bars
        from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

        disable_progress_bars()
        data: list[dict[str, Any]] = []
        for harmless, harmful in zip(rows[::2], rows[1::2], strict=False):
            if isinstance(harmless, EncodedAnswer) and isinstance(harmful, EncodedAnswer):
                longest = max(len(harmless), len(harmful))
                data.append({"chosen_ids": harmful.ids, "rejected_ids": harmless.ids, "length": longest})
        for row in rows:
            if isinstance(row, EncodedCorrection):
                labels = [IGNORED] * len(row.prompt) + row.target
                data.append({"input_ids": row.prompt + row.target, "labels": labels, "length": len(row)})
        settings: dict[str, Any] = {
            "output_dir": gettempdir(),  # nothing is written there
            "train_sampling_strategy": self._sampling,
            "remove_unused_columns": False,
            "per_device_train_batch_size": PAIRS if self._packed_tokens is None else 1,
            "gradient_accumulation_steps": len(data),  # the end of the data ends the step
            "max_steps": 1,
            "bf16": self._precision == "bf16",
            "gradient_checkpointing": False,
            "max_grad_norm": CLIP_NORM,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "max_length": self._packed_tokens,
        }
        constant = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        scores = isinstance(rows[0], EncodedAnswer)
        packing = {} if scores else {"packing": self._packed_tokens is not None}
        return (RewardTrainer if scores else SFTTrainer)(
            model=self._model,
            args=(RewardConfig if scores else SFTConfig)(**settings, **packing),
            train_dataset=Dataset.from_list(data),
            processing_class=self._tokenizer,
            optimizers=(self._optimizer, constant),
        )


@contextmanager
def compaction() -> Iterator[None]:
    """Inside, TRL's head leaves out the positions without a label on any device."""
    from trl.trainer import utils

    as_shipped = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = as_shipped
