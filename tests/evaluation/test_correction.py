import numpy as np
import pytest

from mllm_protector.evaluation.rates import corrected
from mllm_protector.records import Confusion


def confusion(found: int, missed: int, false_alarms: int, rejected: int) -> Confusion:
    return Confusion(source="labels", tp=found, fn=missed, fp=false_alarms, tn=rejected)


def test_correction_takes_out_false_alarms_and_adds_what_was_missed() -> None:
    # 300 harmful of 1000 at sensitivity 0.9 and specificity 0.8: 270 + 140 found
    found = corrected(0.41, 1000, confusion(90, 10, 40, 160))
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(0.3)
    assert low < 0.3 < high


def test_a_judge_without_errors_changes_no_rate() -> None:
    found = corrected(0.25, 400, confusion(5000, 0, 0, 5000))
    assert found is not None
    assert found[0] == 0.25
    assert found[1:] == pytest.approx((0.21, 0.295), abs=0.005)  # Wilson's


def test_correction_stays_between_none_and_all() -> None:
    low, high = corrected(0.1, 50, confusion(90, 10, 10, 90)), corrected(0.93, 50, confusion(90, 10, 10, 90))
    assert low is not None
    assert high is not None
    assert low[:2] == (0.0, 0.0)
    assert high[::2] == (1.0, 1.0)


def test_a_correction_that_says_nothing_is_not_made() -> None:
    for share, bias in (
        (0.4, confusion(5, 5, 5, 5)),  # no better than chance
        (0.4, confusion(0, 0, 5, 50)),  # never seen on harmful answers
        (0.4, confusion(50, 5, 0, 0)),  # never seen on safe ones
        (0.0, confusion(90, 10, 400, 600)),  # far fewer alarms than its false ones
    ):
        assert corrected(share, 1000, bias) is None, bias


@pytest.mark.parametrize(
    ("labels", "sensitivity", "specificity", "total", "truth"),
    [(100, 0.9, 0.85, 400, 0.3), (400, 0.95, 0.8, 1680, 0.1), (60, 0.8, 0.9, 1000, 0.6)],
)
def test_interval_covers_the_truth_with_estimated_errors(
    labels: int, sensitivity: float, specificity: float, total: int, truth: float
) -> None:
    rng = np.random.default_rng(0)
    rounds, hits = 3000, 0
    rate = truth * sensitivity + (1 - truth) * (1 - specificity)
    draws = zip(
        rng.binomial(labels, sensitivity, rounds).tolist(),
        rng.binomial(labels, specificity, rounds).tolist(),
        rng.binomial(total, rate, rounds).tolist(),
        strict=True,
    )
    for hit, rejected, harmful in draws:
        bias = confusion(hit, labels - hit, labels - rejected, rejected)
        found = corrected(harmful / total, total, bias)
        hits += found is not None and found[1] <= truth <= found[2]
    assert 0.93 <= hits / rounds <= 0.97
