"""One run at a time in a folder: a lock that names the host and the process that hold it.

It is a file that one of several hosts can be the first to make, and not a lock of the operating system: those
are missing or local to one host on some network file systems, and cannot say who holds them. So of a run that
was killed on this host it is seen that it is dead; of one on another host a person has to say so.
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
    """Who made a lock, and when by the clock of that host."""

    host: str
    pid: int
    since: float

    def lives(self) -> bool:
        """Whether that process still runs on this host; its number may be another one's now."""
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
        folder: is there.
        key: of the folder, as the user typed it.

    Raises:
        InputError: another run is at work there, or may be.
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
        raise InputError(f"{path}: is no lock file; remove it")
    try:
        host, pid, since = path.read_text(encoding="utf-8").split()
        return _Holder(host, int(pid), float(since))
    except FileNotFoundError:
        return None
    except ValueError:  # whoever wrote it did not live to the end of the line
        return _Holder(socket.gethostname(), 0, 0.0)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes of this host must not both take over the lock of a dead one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
