"""What a training leaves behind: the weights worth keeping, the figures, and words on the way."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from mllm_protector.errors import InputError, RunError
from mllm_protector.files import write_json, write_text, writing
from mllm_protector.metrics import HIGHER_IS_BETTER
from mllm_protector.training.checkpoint import CHECKPOINTS, Checkpoints
from mllm_protector.training.tracking import Tracker

log = logging.getLogger(__name__)

SPOKEN = 4
"""Figures of a validation that the log says; metrics.jsonl has them all."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a finished training says.

    Attributes:
        metrics: validation figures of the kept weights.
        step: the step at which they were the best.
        last_metrics: validation figures at the end.
        steps: all steps made.
    """

    metrics: dict[str, float]
    step: int
    last_metrics: dict[str, float]
    steps: int

    def write(self, folder: Path, **counts: int) -> dict[str, Any]:
        """Write ``metrics.json`` (on the first process) and return its content.

        The kept weights' figures are at the top level, those of the last step under ``last``. Then the
        training is complete, and its checkpoints are removed.
        """
        content = {
            **self.metrics,
            **counts,
            "step": self.step,
            "steps": self.steps,
            "last": self.last_metrics,
        }
        if PartialState().is_main_process:
            with writing(str(folder / "metrics.json")):
                write_json(folder / "metrics.json", content)
            Checkpoints(folder / CHECKPOINTS, keep_last=1).clear()
            log.info("written: %s (the weights of step %s, metrics.json, metrics.jsonl)", folder, self.step)
        return content


Kept = tuple[dict[str, float], int]
"""Validation figures, and the step at which they were measured."""


class Keeper:
    """Keeps the best weights in the output folder and the last ones in ``last``."""

    def __init__(
        self,
        metric: str,
        folder: Path,
        save: Callable[[Path, dict[str, float]], None],
        *,
        best: Kept | None = None,
        last: Kept | None = None,
    ) -> None:
        """Begin, or go on from a ``state``.

        Args:
            metric: the figure by which weights are the best.
            folder: where they go.
            save: is called on every process, for weights that are shared out.
            best: figures of the best weights, and their step.
            last: figures of the last validation, and its step.
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

    def state(self) -> dict[str, Kept | None]:
        """What goes on with a resumed training."""
        return {"best": self.best, "last": self.last}

    def offer(self, metrics: dict[str, float], step: int) -> None:
        """Save the weights if they are the best so far; of equals the first is kept.

        Raises:
            InputError: the named metric is not among the figures.
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

    def _save(self, folder: Path, kept: Kept) -> None:
        metrics, step = kept
        with writing(f"{folder}: the weights of step {step}"):
            self.save(folder, metrics)


class Journal:
    """``metrics.jsonl``, the tracker, and the progress: a bar on a terminal, some lines elsewhere.

    To be used in a ``with``, which begins a new file, or keeps what an interrupted training wrote up to its
    checkpoint. Where it is not active it does nothing.
    """

    def __init__(
        self,
        output_dir: Path,
        tracker: Tracker,
        settings: Mapping[str, Any],
        *,
        done: int,
        validated: int,
        total: int,
        every: int,
        best_metric: str,
        active: bool,
    ) -> None:
        """Open nothing yet.

        Args:
            output_dir: where ``metrics.jsonl`` goes.
            tracker: takes the figures too.
            settings: what the tracker shall know of the run.
            done: steps of an interrupted training that is gone on with.
            validated: its last step with a validation.
            total: steps of the whole training.
            every: steps between training figures; all validation figures are written.
            best_metric: the figure by which weights are kept, said first of a validation's.
            active: true on the first process only.
        """
        self.path = output_dir / "metrics.jsonl"
        self.tracker = tracker
        self.settings = settings
        self.done = done
        self._keep = {"train": done, "validation": validated}
        self.total = total
        self.every = every
        self.best_metric = best_metric
        self.active = active
        # disable=None: no bar where there is no terminal
        self._bar = tqdm(
            total=total, initial=done, desc="training", unit="step", disable=None if active else True
        )

    def __enter__(self) -> "Journal":
        if self.active:
            with writing(str(self.path)):
                write_text(self.path, "".join(self._lines_to_keep()))
            self.tracker.start(str(self.path.parent), self.settings, resumed=self.done > 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self.active and kind is None:
            self.tracker.finish()

    def trained(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step: ``loss``, ``learning_rate``, ``tokens_per_second`` and others."""
        words = (
            f"loss {figures['loss']:.4f}, learning rate {figures['learning_rate']:.1e}, "
            f"{figures['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update()
        self._bar.set_postfix_str(words)
        if step % self.every == 0 or step == self.total:
            self._write("train", step, figures)
        if self._bar.disable and step % max(1, self.total // 10) == 0:
            self._say(f"step {step:,} of {self.total:,}: {words}")

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take validation figures."""
        self._write("validation", step, metrics)
        first = list(dict.fromkeys(name for name in (self.best_metric, "loss", *metrics) if name in metrics))
        words = ", ".join(f"{name} {metrics[name]:.4f}" for name in first[:SPOKEN])
        self._say(f"step {step:,} of {self.total:,}: validation {words}")

    def _lines_to_keep(self) -> Iterator[str]:
        """What was written up to the checkpoint; a line that was cut off is none."""
        if self.done:
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and (row := json.loads(line))["step"] <= self._keep[row["kind"]]:
                    yield line

    def _write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        if self.active:
            with writing(str(self.path)), self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, "kind": kind, **figures}, allow_nan=False) + "\n")
            self.tracker.log({f"{kind}/{name}": value for name, value in figures.items()}, step)

    def _say(self, words: str) -> None:
        if self.active:
            say = log.info if self._bar.disable else tqdm.write
            say(words)


@dataclass
class Meter:
    """How fast a training is, and how much of it is padding.

    Attributes:
        tokens: real ones so far.
        positions: all that were computed, with padding.
        seconds: of optimisation, without validations and checkpoints.
    """

    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time inside."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun

    def count(self, *, tokens: int, positions: int) -> None:
        """Take what a step has computed."""
        self.tokens += tokens
        self.positions += positions

    def figures(self) -> dict[str, float]:
        """Means of the whole training so far."""
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "padded_over_real": self.positions / self.tokens,
        }


def require_metric(metric: str, known: Iterable[str]) -> None:
    """Check that the figure by which weights are chosen is one that is measured.

    Raises:
        InputError: it is not.
    """
    if metric not in known:
        raise InputError(f"fit.best_metric={metric}: choose one of {', '.join(known)}")
