import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit

from mllm_protector.guard.calibration import TEMPERATURES, fit_scale
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.guard_file import Scale

Floats = NDArray[np.float64]
Sample = tuple[list[bool], Floats]
WRONG: dict[str, Callable[[Floats], Floats]] = {
    "three times too sure": lambda logits: 3 * logits,
    "three times too unsure": lambda logits: logits / 3,
    "all too high": lambda logits: logits + 1.5,
    "too sure and too high": lambda logits: 3 * logits + 3,
}


def honest(count: int, seed: int) -> Sample:
    """Labels of both kinds, drawn as often as sigmoid(logit) says."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, count)
    labels = rng.random(count) < expit(logits)
    if labels.all() or not labels.any():
        labels[0] = not labels[0]
    return list(map(bool, labels)), logits


def test_wrong_scores_are_mended_for_other_answers() -> None:
    for name, wrong in WRONG.items():
        for seed in range(5):
            labels, logits = honest(500, seed)
            scale = fit_scale(labels, list(wrong(logits)))
            others, more = honest(4_000, seed=100 + seed)
            before = expected_calibration_error(others, list(expit(wrong(more))))
            after = expected_calibration_error(others, scale.scores(wrong(more)))
            assert after < before / 2, (name, seed)


def test_a_known_scale_is_found_again() -> None:
    labels, logits = honest(20_000, seed=0)
    for scale in (0.25, 1.0, 4.0):
        for offset in (-2.0, 0.0, 1.5):
            found = fit_scale(labels, list(scale * logits - offset))
            assert found.temperature == pytest.approx(scale, rel=0.05), (scale, offset)
            assert found.offset == pytest.approx(offset, abs=0.05 * scale), (scale, offset)


def test_no_scale_near_it_has_a_smaller_log_loss() -> None:
    labels, logits = honest(300, seed=1)
    harmful = np.array(labels)
    target = np.where(harmful, (harmful.sum() + 1) / (harmful.sum() + 2), 1 / ((~harmful).sum() + 2))

    def loss(temperature: float, offset: float) -> float:
        scaled = Scale(temperature=temperature, offset=offset).logits(logits)
        return float(np.mean(np.logaddexp(0, scaled) - target * scaled))

    best = fit_scale(labels, list(logits))
    for factor, added in ((1.01, 0.0), (0.99, 0.0), (1.0, 0.01), (1.0, -0.01)):
        assert loss(best.temperature * factor, best.offset + added) > loss(best.temperature, best.offset)


def test_answers_without_a_mistake_give_finite_scores_that_are_not_too_sure() -> None:
    labels = [False] * 50 + [True] * 50
    for low, high in ((-0.1, 0.1), (2.9, 3.1), (-8.0, 8.0)):
        scale = fit_scale(labels, [low] * 50 + [high] * 50)
        # 51 of 52, as the smoothed labels say
        assert scale.scores([low, high]) == pytest.approx([1 / 52, 51 / 52], abs=1e-4), (low, high)


@pytest.mark.parametrize("size", [1.0, 1e6])
@given(rows=st.lists(st.tuples(st.booleans(), st.floats(-50, 50)), min_size=1, max_size=30))
def test_a_scale_is_finite_and_keeps_the_order_whatever_the_logits(
    size: float, rows: list[tuple[bool, float]]
) -> None:
    labels = [True, False, *(label for label, _ in rows)]
    logits = [size * logit for logit in (1.0, 0.0, *(logit for _, logit in rows))]
    scale = fit_scale(labels, logits)
    assert TEMPERATURES[0] * (1 - 1e-9) <= scale.temperature <= TEMPERATURES[1] * (1 + 1e-9)
    assert math.isfinite(scale.offset)
    scores = scale.scores(sorted(logits))
    assert scores == sorted(scores)
    assert all(0 <= score <= 1 for score in scores)


def test_turned_scores_end_at_the_highest_temperature_and_not_turned_round() -> None:
    labels, logits = honest(500, seed=0)
    assert fit_scale(labels, list(-logits)).temperature == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_a_score_is_the_probability_of_a_positive_logit() -> None:
    assert Scale().scores([0.0, math.log(3), -2 * math.log(3)]) == pytest.approx([0.5, 0.75, 0.1])
    assert Scale(temperature=2.0).scores([2 * math.log(3)]) == pytest.approx([0.75])
    # the offset is added before the temperature divides
    assert Scale(temperature=2.0, offset=math.log(3)).scores([math.log(3)]) == pytest.approx([0.75])
    assert math.isnan(Scale().scores([math.nan])[0])
    assert Scale().scores([]) == []


def test_strong_scores_stay_apart() -> None:
    weaker, stronger = Scale().scores([25.0, 30.0])
    assert weaker < stronger < 1.0
