import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mllm_protector.config import clear_errors
from mllm_protector.training import resume
from mllm_protector.training.resume import SIGNALS, Interruption, Stopped


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), number)
        assert interruption.signal is number


def test_a_second_signal_acts_as_it_does_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "ECHO_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), Interruption():  # noqa: PT012 - what is asked is that the second raises
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_signal_that_arrives_twice_at_once_counts_once() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal is signal.SIGTERM


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, within = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Interruption() as interruption:
            within.append((signal.getsignal(signal.SIGTERM), interruption.signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [(before, None)]


def test_a_stopped_run_exits_as_shells_expect(capsys: pytest.CaptureFixture[str]) -> None:
    for number, exit_code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with pytest.raises(SystemExit) as raised, clear_errors():
            raise Stopped(number, 120)
        assert raised.value.code == exit_code
        assert f"stopped by {number.name} after step 120" in capsys.readouterr().err
