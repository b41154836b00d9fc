"""Ctrl-C and SIGTERM end a command: the first one in order and within seconds, a second one at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(KeyboardInterrupt):
    """The process was asked to stop (exit code 128 + the signal's number)."""

    def __init__(self, received: signal.Signals) -> None:
        """By this signal."""
        super().__init__(
            f"stopped by {received.name}; what was finished is kept, and the same command goes on from there"
        )
        self.exit_code = 128 + received


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stop`` in the main thread at the first SIGINT or SIGTERM; end the process at the second.

    Elsewhere than in the main thread, and within itself, it does nothing. A signal that was ignored before
    stays ignored, as for a job in the background. After a stop the handlers stay, as the process will end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, _first)]
    for number in ours:
        signal.signal(number, _first)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _first:
                signal.signal(number, before[number])


def _first(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        if signal.getsignal(each) is _first:
            signal.signal(each, _second)
    raise Stop(signal.Signals(number))


def _second(number: int, frame: FrameType | None) -> None:
    os.write(2, f"error: stopped at once by a second {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
