"""What a training reports while it runs: ``metrics.jsonl``, a tracker, and the log."""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mllm_protector.errors import RunError
from mllm_protector.files import write_text, writing
from mllm_protector.progress import Progress
from mllm_protector.training.settings import FitConfig

log = logging.getLogger(__name__)

SHOWN = 4
"""Metrics of a validation that the log shows; metrics.jsonl has them all."""


class Tracker:
    """Takes metrics while a model trains. Only the first process calls it."""

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Called once before the first step; ``resumed`` if an earlier call for the folder had steps."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Called with metrics as they arise."""

    def finish(self) -> None:
        """Called once at the end, unless the training failed."""


class NoTracker(Tracker):
    """Nothing besides ``metrics.jsonl``."""


@dataclass(slots=True, kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases.

    Attributes:
        project: the project's name there.
        mode: ``offline`` writes below ``output_dir`` for a later ``wandb sync``, which the log words at the
            end; ``online`` needs a key.
        name: of the run; ``None`` lets wandb choose.
    """

    project: str
    mode: Literal["offline", "online"]
    name: str | None
    _run: Any = field(default=None, init=False, repr=False)
    _resumed: bool = field(default=False, init=False, repr=False)

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Open a run, or resume the one whose id is in ``output_dir``.

        Raises:
            RunError: wandb cannot be reached or has no key.
        """
        import wandb

        self._resumed = resumed
        path = Path(output_dir) / "wandb_run_id.txt"
        if not (resumed and path.exists()):
            write_text(path, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                id=path.read_text(encoding="utf-8"),
                resume="allow" if resumed and self.mode == "online" else None,
                project=self.project,
                name=self.name,
                mode=self.mode,
                dir=output_dir,
                config=dict(settings),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"tracker.mode={self.mode}: wandb did not start ({reason}); try tracker.mode=offline"
            ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Close the run, and say where an offline one is."""
        folder = Path(self._run.dir).parent  # of its files
        self._run.finish()
        if self.mode == "offline":
            command = "wandb sync --append" if self._resumed else "wandb sync"
            log.info("offline run of Weights & Biases: to upload it, type: %s %s", command, folder)


class MetricLogger:
    """Writes ``metrics.jsonl``, feeds the tracker, and shows how far the training is.

    Used in a ``with``, which begins a new file, or keeps the lines of an interrupted training up to its
    checkpoint. On all processes but the first it does nothing.
    """

    def __init__(
        self,
        output_dir: Path,
        tracker: Tracker,
        config: FitConfig,
        facts: Mapping[str, Any],
        *,
        done: int,
        validated: int,
        total: int,
        active: bool,
    ) -> None:
        """Open nothing yet.

        The tracker gets ``config``, ``facts`` and all metrics. ``done`` steps were made before, the last
        validation among them after step ``validated``. Only the first process is ``active``.
        """
        self.path = output_dir / "metrics.jsonl"
        self._tracker, self._config, self._facts = tracker, config, facts
        self._done, self._validated, self._total = done, validated, total
        self._active = active
        self._tokens, self._seconds = 0, 0.0

    def __enter__(self) -> "MetricLogger":
        if self._active:
            with writing(str(self.path)):
                write_text(self.path, "".join(self._lines_to_keep()))
            settings = {"fit": asdict(self._config), **self._facts}
            self._tracker.start(str(self.path.parent), settings, resumed=self._done > 0)
        self._progress = Progress("training", "step", self._total, done=self._done, active=self._active)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        if self._active and kind is None:
            self._tracker.finish()

    def trained(self, step: int, metrics: Mapping[str, float], *, tokens: int, seconds: float) -> None:
        """Log a step: its ``loss``, ``learning_rate`` and others, and the mean speed since the start."""
        self._tokens += tokens
        self._seconds += seconds
        speed = self._tokens / self._seconds
        text = (
            f"loss {metrics['loss']:.4f}, learning rate {metrics['learning_rate']:.1e}, {speed:,.0f} tokens/s"
        )
        self._progress.update(note=text, milestone=step % max(1, self._total // 10) == 0)
        if step % self._config.log_every == 0 or step == self._total:
            self._write("train", step, {**metrics, "tokens_per_second": speed})

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a validation."""
        self._write("validation", step, metrics)
        first = dict.fromkeys(
            name for name in (self._config.best_metric, "loss", *metrics) if name in metrics
        )
        text = ", ".join(f"{name} {metrics[name]:.4f}" for name in list(first)[:SHOWN])
        self._progress.write(f"step {step:,} of {self._total:,}: validation {text}")

    def _lines_to_keep(self) -> Iterator[str]:
        """The lines written up to the checkpoint; a line that was cut off is left out."""
        keep = {"train": self._done, "validation": self._validated}
        if self._done:
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and (row := json.loads(line))["step"] <= keep[row["kind"]]:
                    yield line

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._active:
            with writing(str(self.path)), self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, "kind": kind, **metrics}, allow_nan=False) + "\n")
            self._tracker.log({f"{kind}/{name}": value for name, value in metrics.items()}, step)
