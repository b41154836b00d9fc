"""One run at a time in a folder: a lock file that names its host and process.

Locks of the operating system are missing or local to one host on some network file systems, and do not say
who holds them. The lock of a run that was killed on this host is recognised as stale. For a run on another
host, a person has to decide.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mllm_protector.errors import InputError

LOCK = ".mllm_protector.lock"


@dataclass(frozen=True, slots=True)
class _Holder:
    """The process that made a lock, and the time by its host's clock (seconds since the epoch)."""

    host: str
    pid: int
    since: float

    def lives(self) -> bool:
        """Whether that process still runs on this host. Its number may have been reused."""
        try:
            process = psutil.Process(self.pid)
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return not zombie and bool(process.create_time() <= self.since + 1)
        except (psutil.NoSuchProcess, ValueError):  # gone, or never one
            return False


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Keep other runs out of a folder.

    Args:
        folder: an existing folder.
        key: the folder's key, as the user typed it.

    Raises:
        InputError: another run uses the folder, or may use it.
        OSError: the lock cannot be written.
    """
    path = folder / LOCK
    mine = _Holder(socket.gethostname(), os.getpid(), time.time())
    with _one_at_a_time(folder):
        if (holder := _read(path)) is not None:
            _require_dead(holder, path, key)
            path.unlink()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{mine.host} {mine.pid} {mine.since}\n")
        except FileExistsError:
            raise InputError(f"{key}={folder}: a run on another host has just begun there") from None
    try:
        yield
    finally:
        if _read(path) == mine:
            path.unlink()


def _require_dead(holder: _Holder, path: Path, key: str) -> None:
    busy = f"{key}={path.parent}: another run writes there (host {holder.host}, process {holder.pid}); "
    if holder.host != socket.gethostname():
        raise InputError(f"{busy}wait for it, choose another {key}, or, if that run is dead, remove {path}")
    if holder.lives():
        raise InputError(f"{busy}wait for it or choose another {key}")


def _read(path: Path) -> _Holder | None:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a lock file; remove it")
    try:
        host, pid, since = path.read_text(encoding="utf-8").split()
        return _Holder(host, int(pid), float(since))
    except FileNotFoundError:
        return None
    except ValueError:  # its process was killed while it wrote the line
        return _Holder(socket.gethostname(), 0, 0.0)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two processes of this host from taking over the same stale lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
