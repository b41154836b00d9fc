"""Everything that ends a command early: errors that a user can cause, refusals of the system, and signals.

The scripts print each of these as one line that names the file, line or key and says what to do. Any other
exception is a fault of ours and keeps its traceback.
"""

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InputError(Exception):
    """Something the user gave cannot be used (exit code 2)."""

    exit_code = 2


class RecordError(InputError):
    """A line of a data file cannot be used; the message starts with ``file:line:``."""


class RunError(InputError):
    """The input was fine but the run failed, for example because the loss became NaN (exit code 1)."""

    exit_code = 1


class Stop(KeyboardInterrupt):
    """The process was asked to stop (exit code 128 + the signal's number)."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(
            f"stopped by {received.name}; finished work is kept, and the same command continues from there"
        )
        self.exit_code = 128 + received


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stop`` in the main thread at the first SIGINT or SIGTERM; end the process at the second.

    It does nothing outside the main thread or inside itself. A signal that was ignored before stays ignored,
    as in a background job. After a stop the handlers remain, because the process is about to end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, _first)]
    for number in ours:
        signal.signal(number, _first)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _first:
                signal.signal(number, before[number])


def system_error(error: Exception) -> str | None:
    """One line for an error of the operating system, with the file if it is known; ``None`` for any other.

    Libraries in Rust (safetensors, tokenizers) raise exceptions of other classes for these.
    """
    if isinstance(error, OSError):
        number, words = error.errno, error.strerror or str(error)
        if error.filename:
            words = f"{error.filename}: {words}"
        elif number not in _FULL:
            return None
    elif found := re.search(r"\(os error (\d+)\)", str(error)):
        number, words = int(found.group(1)), str(error)
    else:
        return None
    advice = "; make room and repeat the command, earlier files are unchanged"
    return words + advice * (number in _FULL)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or a quota or file size limit is reached."""


def _first(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) is _first:
            signal.signal(each, _second)
    raise Stop(signal.Signals(number))


def _second(number: int, frame: FrameType | None) -> None:
    os.write(2, f"error: stopped at once by a second {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
