"""Keeps one model worker running."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from mllm_protector.errors import InputError, RunError
from mllm_protector.serving.child import Child
from mllm_protector.serving.settings import GuardSettings, QueueSettings, RestartSettings

COMMAND = (sys.executable, "-m", "mllm_protector.serving.worker")

LONGEST_PATH = 100
"""Bytes of a unix socket's path; the system's limit is 104 or 108."""


class Supervisor(Child):
    """A model worker that is there while the context lasts.

    Attributes:
        path: of the worker's socket, in a folder that only this user may enter.
    """

    def __init__(
        self,
        guard: GuardSettings,
        queue: QueueSettings,
        restart: RestartSettings,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Set it up; nothing is started yet. ``command`` gets the socket's path and the settings as JSON."""
        super().__init__("the model worker", command, restart, stop_s=restart.stop_s)
        self._settings = json.dumps(
            {"guard": asdict(guard), "queue": asdict(queue), "hang_s": restart.hang_s}, allow_nan=False
        )
        self._folder: Path | None = None

    @property
    def path(self) -> Path:
        """The worker's socket."""
        if self._folder is None:
            raise RunError("the model worker was not started")
        return self._folder / "guard.sock"

    async def __aenter__(self) -> Self:
        """Start the worker and wait until it takes requests.

        Raises:
            InputError: the path of the temporary folder is too long.
            RunError: as of ``Child.start``.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="mllm-protector-"))  # of mode 0700
        try:
            if len(os.fsencode(self.path)) > LONGEST_PATH:
                raise InputError(f"{self.path}: too long for a socket; set TMPDIR to a shorter path")
            self._command = (*self._command, str(self.path), self._settings)
            await self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the worker finish what is under way, for ``stop_s`` at most."""
        try:
            await self.stop()
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
