"""The outcome of a training: its best weights, its last ones, and their metrics."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mllm_protector.errors import InputError, RunError
from mllm_protector.files import write_json, writing
from mllm_protector.metrics import HIGHER_IS_BETTER
from mllm_protector.training.checkpoints import CHECKPOINTS, Checkpoints

log = logging.getLogger(__name__)

Measured = tuple[dict[str, float], int]
"""Validation metrics, and the step at which they were measured."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The outcome of a training.

    Attributes:
        metrics: validation metrics of the best weights.
        step: at which they were measured.
        last_metrics: validation metrics at the end.
        steps: of the whole training.
    """

    metrics: dict[str, float]
    step: int
    last_metrics: dict[str, float]
    steps: int

    def write(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Write ``metrics.json`` (on the first process) and return its content.

        The best weights' metrics are at the top level, those of the last step under ``last``. The training
        is then complete, and its checkpoints are removed.
        """
        content = {**self.metrics, **more, "step": self.step, "steps": self.steps, "last": self.last_metrics}
        if PartialState().is_main_process:
            with writing(str(folder / "metrics.json")):
                write_json(folder / "metrics.json", content)
            Checkpoints(folder / CHECKPOINTS, keep_last=1).clear()
            log.info("written: %s (weights of step %s, metrics.json, metrics.jsonl)", folder, self.step)
        return content


class BestCheckpoint:
    """Keeps the best weights in the output folder, and the last ones in ``last``."""

    def __init__(
        self,
        metric: str,
        folder: Path,
        save: Callable[[Path, dict[str, float]], None],
        *,
        best: Measured | None = None,
        last: Measured | None = None,
    ) -> None:
        """Begin, or continue from the ``state`` of an earlier one.

        Args:
            metric: decides which weights are the best.
            folder: where they go.
            save: called on every process, for weights that are sharded.
            best: metrics of the best weights, and their step.
            last: metrics of the last validation, and its step.
        """
        self.metric = metric
        self.folder = folder
        self.save = save
        self.best = best
        self.last = last

    @property
    def step(self) -> int:
        """Of the last validation; 0 before the first."""
        return self.last[1] if self.last else 0

    def state(self) -> dict[str, Measured | None]:
        """What a resumed training continues with."""
        return {"best": self.best, "last": self.last}

    def update(self, metrics: dict[str, float], step: int) -> None:
        """Save the weights if they are the best so far; of equals the first is kept.

        Raises:
            InputError: the metric is not among the metrics.
            RunError: the weights cannot be written.
        """
        require_metric(self.metric, metrics)
        self.last = (metrics, step)
        sign = 1.0 if self.metric in HIGHER_IS_BETTER else -1.0
        if self.best is None or sign * metrics[self.metric] > sign * self.best[0][self.metric]:
            self.best = (metrics, step)
            self._save(self.folder, self.best)

    def finish(self, steps: int) -> Fitted:
        """Save the last weights where they are not the best."""
        if self.best is None or self.last is None:
            raise RunError("the training ended without a validation")
        if self.last[1] != self.best[1]:
            self._save(self.folder / "last", self.last)
        return Fitted(self.best[0], self.best[1], self.last[0], steps)

    def _save(self, folder: Path, measured: Measured) -> None:
        metrics, step = measured
        with writing(f"{folder}: the weights of step {step}"):
            self.save(folder, metrics)


def require_metric(metric: str, known: Iterable[str]) -> None:
    """Check ``fit.best_metric``.

    Raises:
        InputError: it is not one of the metrics that are measured.
    """
    if metric not in known:
        raise InputError(f"fit.best_metric={metric}: choose one of {', '.join(known)}")
