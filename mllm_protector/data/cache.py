"""What is made from data once and used again: folders that are known by all they were made of.

They lie in ``$MLLM_PROTECTOR_CACHE``, else in ``mllm_protector`` beneath the user's cache folder, and may be
removed at any time when nothing runs.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from mllm_protector.errors import RunError, system_error
from mllm_protector.files import content_key, file_digest

VARIABLE = "MLLM_PROTECTOR_CACHE"

ABANDONED = 86_400
"""Seconds after which a half-made folder that nothing was written to belongs to a killed run."""


def cache_folder() -> Path:
    """Where everything lies; it need not exist."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_protector"


def code_digest(*modules: ModuleType) -> str:
    """A hash of modules' source: what another version of them made is another content."""
    return content_key([file_digest(Path(str(module.__file__))) for module in modules])


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of this kind and key; it is made whole or not at all.

    Several processes may make the same at once: the first one to finish is used by all.

    Args:
        kind: what it holds, in a word.
        key: a hash of all that it depends on (``content_key``).
        make: fills an empty folder.

    Raises:
        RunError: it cannot be written.
    """
    folder = cache_folder() / kind / key
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{key}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        _remove_abandoned(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        make(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    except Exception as error:
        if not isinstance(error, OSError) and system_error(error) is None:
            raise
        raise RunError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}); make room, or name "
            f"another place in the environment variable {VARIABLE}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_abandoned(folder: Path) -> None:
    for rest in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            newest = max(path.stat().st_mtime for path in [rest, *rest.iterdir()])
            if time.time() - newest > ABANDONED:
                shutil.rmtree(rest, ignore_errors=True)
