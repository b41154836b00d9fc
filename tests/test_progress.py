"""Where there is no terminal, long work says once a minute how far it is."""

import logging

import pytest

from mllm_protector import progress
from mllm_protector.progress import Progress, followed


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    caplog.set_level(logging.INFO)
    return clock


def test_a_line_a_minute_has_the_rate_and_the_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with Progress("scoring", "answer", 2000, done=400) as bar:
        for _ in range(15):  # 20 answers in 10 seconds
            clock.now += 10
            bar.update(20)
    assert caplog.messages == [
        "scoring: answer 520 of 2,000, 2/s, 12:20 left",
        "scoring: answer 640 of 2,000, 2/s, 11:20 left",
    ]


def test_short_work_says_nothing_but_its_milestones(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("training", "step", 4) as bar:
        for step in range(1, 5):
            clock.now += 0.5
            bar.update(note=f"loss {step}", milestone=step == 2)
    assert caplog.messages == ["training: step 2 of 4, 2/s, 00:01 left: loss 2"]


def test_work_of_unknown_length_has_a_rate_only(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("tokenising", "row") as bar:
        clock.now += 100
        bar.update(123_400)
    assert caplog.messages == ["tokenising: row 123,400, 1,234/s"]


def test_rows_are_counted_when_their_work_is_done(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for row in followed(["a", "b", "c"], "reading", "text"):
        clock.now += 40
        assert len(caplog.messages) == (row == "c")
    assert caplog.messages == ["reading: text 2 of 3, 0.025/s, 00:40 left"]


def test_only_the_first_process_speaks(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("training", "step", 3, active=False) as bar:
        clock.now += 100
        bar.update(milestone=True)
        bar.write("validated")
    assert not caplog.messages
