"""Where training figures go besides ``metrics.jsonl``, which is always written."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mllm_protector.errors import RunError
from mllm_protector.files import write_text


class Tracker(Protocol):
    """Takes figures while a model trains. Only the first process calls it."""

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Called once before the first step; ``resumed`` if an earlier call for the folder had steps."""
        ...

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Called with figures as they arise."""
        ...

    def finish(self) -> None:
        """Called once at the end, unless the training failed."""
        ...


@dataclass(frozen=True, slots=True)
class NoTracker:
    """Nothing besides ``metrics.jsonl``."""

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Do nothing."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


@dataclass(slots=True, kw_only=True)
class WandbTracker:
    """Weights & Biases.

    Attributes:
        project: the project's name there.
        mode: ``offline`` writes below ``output_dir`` for a later ``wandb sync`` (with ``--append`` for a
            training that was resumed); ``online`` needs a key.
        name: of the run; ``None`` lets wandb choose.
    """

    project: str
    mode: Literal["offline", "online"]
    name: str | None
    _run: Any = field(default=None, init=False, repr=False)

    def start(self, output_dir: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Open the run, or go on with the one whose id stands in ``output_dir``.

        Raises:
            RunError: wandb cannot be reached or has no key.
        """
        import wandb

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

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures."""
        self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
