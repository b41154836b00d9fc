"""Facts about the process for ``run.json``: versions, hardware, commit, peak memory.

They name neither the machine nor its user, nor the command line, nor any environment variable.
"""

import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mllm-protector", "torch", "transformers", "peft", "accelerate")

GIT_SECONDS = 10
"""On a slow file system the commit is unknown; the run is never slow."""


def environment() -> dict[str, Any]:
    """Where this process runs: ``versions``, ``hardware``, ``commit``.

    The version of a package that is not installed is ``None``, and so is the commit outside of a checkout;
    ``dirty`` says whether tracked files differ.
    """
    import psutil
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _first(r"^model name\s*: (.+)$", "/proc/cpuinfo") or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_mib": psutil.virtual_memory().total // 2**20,
            "gpus": [{"name": each.name, "memory_mib": each.total_memory // 2**20} for each in devices],
        },
        "commit": _commit(Path(__file__).parent),
    }


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held so far, in MiB: ``process``, and each GPU it has used."""
    # Linux's own count starts again with each program; that of the C library does not.
    if kib := _first(r"^VmHWM:\s+(\d+) kB$", "/proc/self/status"):
        peak = 1024 * int(kib)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peaks = {"process": round(peak / 2**20, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            if used := torch.cuda.max_memory_allocated(number):
                peaks[f"cuda:{number}"] = round(used / 2**20, 1)
    return peaks


def _first(pattern: str, path: str) -> str | None:
    """The first match's group in a file of the system; ``None`` without one."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found.group(1).strip() if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any] | None:
    """The checkout that tracks the package; a repository that merely surrounds it is another project."""
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    name, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
    return None if name is None or changes is None else {"id": name, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git, or ``None`` if it fails; it gets only the environment that finds programs."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],  # noqa: S607
            env={name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ},
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
