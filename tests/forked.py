"""Processes forked from one that has imported the package and done nothing else.

So they start at once. A test process itself must not be forked: its threads may hold locks, and where it has
computed a gradient its forks cannot compute any.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_protector.processes import leave_processes

SCRIPTS = Path(__file__).parents[1] / "scripts"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.training.kills",
        "tests.training.test_parallel",
        "tests.training.test_resume",
        "tests.evaluation.kills",
        # imported late by the package:
        "hydra",
        "matplotlib.figure",
        "pandas",
        "statsmodels.stats.contingency_tables",
        "statsmodels.stats.inter_rater",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llava.modeling_llava",
    ]
)
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Ran:
    """The exit code, and the output; of several processes the highest code and all output."""

    code: int
    out: str
    err: str


class Started:
    """Processes that do the same work; several are a process group of torch."""

    def __init__(
        self,
        work: Callable[..., object],
        *arguments: Any,
        processes: int = 1,
        cwd: Path | None = None,
        environment: Mapping[str, str] = NOTHING,
    ) -> None:
        self._written = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._written.name, name) for name in ("out", "err"))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in range(processes):
            own = os.environ | environment
            if processes > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                own |= place | {key: str(number) for key, number in numbers.items()}
            files = (str(self.out), str(self.err))
            process = FORKS.Process(target=_begin, args=(own, cwd or Path.cwd(), files, work, arguments))
            process.start()
            self.processes.append(process)

    def end(self, seconds: float = 300) -> Ran:
        for process in self.processes:
            process.join(seconds)
            if process.exitcode is None:
                for each in self.processes:
                    each.kill()
                raise AssertionError(f"it hangs: {self.err.read_text()}")
        code = max((process.exitcode or 0 for process in self.processes), key=abs)
        return Ran(code, self.out.read_text(), self.err.read_text())


def _begin(
    environment: dict[str, str],
    cwd: Path,
    files: tuple[str, str],
    work: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, name in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    try:
        work(*arguments)
        leave_processes()
    finally:
        atexit._run_exitfuncs()


def together(work: Callable[..., object], *arguments: Any, **environment: str) -> None:
    """Do the work in two processes; fails if one of them does."""
    ran = Started(work, *arguments, processes=2, environment=environment).end()
    assert ran.code == 0, ran.out + ran.err


def main(name: str, *arguments: str) -> None:
    """A script, such as ``train_detector``, or a module, such as ``tests.training.kills``."""
    sys.argv = [f"{name}.py", *arguments]
    if "." in name:
        importlib.import_module(name).main()
    else:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def run(name: str, *arguments: str, cwd: Path, processes: int = 1) -> Ran:
    """Run a script or a module as from a command line."""
    return Started(main, name, *arguments, cwd=cwd, processes=processes).end()
