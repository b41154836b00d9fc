"""A polite stop: after the first signal the current step is finished and saved, a second one acts at once."""

import signal
import threading
import time
from types import FrameType, TracebackType

from mllm_protector.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 2.0
"""A scheduler signals a launcher and its processes alike, and the launcher passes the signal on."""


class Stopped(RunError):
    """A training was asked to stop and saved its state (exit code 128 + the signal's number)."""

    def __init__(self, received: signal.Signals, step: int) -> None:
        """After ``step`` steps, which are saved."""
        super().__init__(
            f"stopped by {received.name} after step {step}; everything is saved, repeat the command to resume"
        )
        self.exit_code = 128 + received


class Interruption:
    """Notes SIGTERM and SIGINT while it is active; in the main thread only, elsewhere it does nothing.

    A signal that was ignored before stays ignored, as for a job in the background.

    Attributes:
        signal: the first one received, or ``None``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif now - self._since > ECHO_SECONDS:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
