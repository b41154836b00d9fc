"""What a front remembers of the last hour."""

from mllm_protector.serving.state import LATEST, LastHour


class Clock:
    now = 1e6 * 60

    def __call__(self) -> float:
        return self.now


def test_outcomes_are_counted_by_minute_and_forgotten_after_an_hour() -> None:
    clock = Clock()
    hour = LastHour(clock)
    hour.add("allowed")
    hour.add("refused")
    clock.now += 59
    hour.add("allowed")
    assert hour.minutes() == 59 * [{}] + [{"allowed": 2, "refused": 1}]
    clock.now += 10 * 60
    hour.add("rewritten")
    minutes = hour.minutes()
    assert (minutes[49], minutes[59]) == ({"allowed": 2, "refused": 1}, {"rewritten": 1})
    clock.now += 50 * 60
    assert hour.minutes() == 9 * [{}] + [{"rewritten": 1}] + 50 * [{}]
    clock.now += 24 * 3600
    hour.add("allowed")
    assert hour.minutes() == 59 * [{}] + [{"allowed": 1}]
    assert len(hour._counts) == 1


def test_latencies_are_of_the_last_hour_and_of_the_latest_requests() -> None:
    clock = Clock()
    hour = LastHour(clock)
    assert hour.latencies() == {}
    hour.took("guard", 100.0)
    clock.now += 3601
    assert hour.latencies() == {}
    for number in range(100):
        hour.took("guard", number / 100)
    assert hour.latencies() == {"guard": {"p50": 0.5, "p95": 0.95, "count": 100}}
    for _ in range(LATEST):
        hour.took("guard", 2.0)
    assert hour.latencies()["guard"] == {"p50": 2.0, "p95": 2.0, "count": LATEST}
