"""What a run was made with, for ``run.json``: versions, hardware, commit, peak memory.

It names neither the machine nor its user, and reads neither the command line nor any variable of the
environment's.
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
"""A slow file system makes the commit unknown, never the run slow."""


def environment() -> dict[str, Any]:
    """Where this process runs.

    Returns:
        ``versions`` of Python and the packages that matter (``None`` if one is not installed), ``hardware``
        (``cpu``, ``cores``, ``memory_mib``, ``gpus``, each with ``name`` and ``memory_mib``), and ``commit``:
        the ``id`` of the checkout that the package is in, with ``dirty``, whether tracked files differ from
        it; ``None`` outside of a checkout.
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {"versions": versions, "hardware": _hardware(), "commit": _commit(Path(__file__).parent)}


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held so far, in MiB: ``process``, and each GPU it has used."""
    peaks = {"process": round(_peak_bytes() / 2**20, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            if peak := torch.cuda.max_memory_allocated(number):
                peaks[f"cuda:{number}"] = round(peak / 2**20, 1)
    return peaks


def _peak_bytes() -> int:
    """By Linux's account, which begins anew with each program; elsewhere what the C library says."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "gpus": [{"name": device.name, "memory_mib": device.total_memory // 2**20} for device in devices],
    }


def _cpu() -> str:
    """The processor's model, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit(folder: Path) -> dict[str, Any] | None:
    """The checkout that tracks the package; a repository that merely lies around it is another project."""
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    name, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
    return None if name is None or changes is None else {"id": name, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or ``None`` if it cannot; of the environment it learns where programs are."""
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
