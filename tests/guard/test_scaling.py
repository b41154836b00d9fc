import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit

from mllm_protector.errors import InputError
from mllm_protector.guard.scaling import TEMPERATURES, fit_scale
from mllm_protector.metrics import expected_calibration_error
from mllm_protector.models.scale import LEVEL, Scale

Floats = NDArray[np.float64]
Sample = tuple[list[bool], Floats]
WRONG: dict[str, Callable[[Floats], Floats]] = {
    "three times too sure": lambda logits: 3 * logits,
    "three times too unsure": lambda logits: logits / 3,
    "all too high": lambda logits: logits + 1.5,
    "too sure and too high": lambda logits: 3 * logits + 3,
}


def honest(count: int, seed: int, mean: float = 0.0) -> Sample:
    """Labels of both kinds, drawn as often as sigmoid(logit) says."""
    dice = np.random.default_rng(seed)
    logits = dice.normal(mean, 2, count)
    labels = dice.random(count) < expit(logits)
    if labels.all() or not labels.any():
        labels[0] = not labels[0]
    return list(map(bool, labels)), logits


def chosen(scale: Scale) -> str:
    return scale.how.partition(":")[0]


def changed(count: int, seeds: range, mean: float = 0.0) -> float:
    """How often scores that are right are changed."""
    scales = [fit_scale(labels, logits) for labels, logits in (honest(count, seed, mean) for seed in seeds)]
    return float(np.mean([(scale.temperature, scale.offset) != (1.0, 0.0) for scale in scales]))


@pytest.mark.parametrize(("count", "mean"), [(100, 0.0), (300, 0.0), (300, -3.0), (2_000, 0.0)])
def test_scores_that_are_right_are_changed_about_five_times_in_a_hundred(count: int, mean: float) -> None:
    assert 0.02 <= changed(count, range(400), mean) <= 0.08


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_mended_for_other_answers(wrong: Callable[[Floats], Floats], seed: int) -> None:
    labels, logits = honest(500, seed)
    scale = fit_scale(labels, list(wrong(logits)))
    others, more = honest(4_000, seed=100 + seed)
    before = expected_calibration_error(others, list(expit(wrong(more))))
    after = expected_calibration_error(others, scale.scores(wrong(more)))
    assert after < before / 2


@pytest.mark.parametrize("scale", [0.25, 4.0])
@pytest.mark.parametrize("offset", [-2.0, 1.5])
def test_a_known_scale_is_found_again(scale: float, offset: float) -> None:
    labels, logits = honest(20_000, seed=0)
    found = fit_scale(labels, list(scale * logits - offset))
    assert found.temperature == pytest.approx(scale, rel=0.05)
    assert found.offset == pytest.approx(offset, abs=0.05 * scale)
    assert chosen(found) == "a temperature and an offset"


def test_the_simplest_scale_that_will_do_is_taken_and_says_why() -> None:
    labels, logits = honest(2_000, seed=3)
    plain = fit_scale(labels, list(logits))
    assert (plain.temperature, plain.offset) == (1.0, 0.0)
    assert plain.p_unchanged is not None
    assert plain.p_unchanged >= LEVEL
    assert plain.how.startswith("the scores as they are: the answers do not reject them (p = 0.")
    hotter = fit_scale(labels, list(4 * logits))
    assert hotter.temperature == pytest.approx(4, rel=0.1)
    assert hotter.offset == 0.0
    assert hotter.how.startswith("a temperature: the answers reject the scores as they are (p < 0.0001)")
    assert "ask for no offset (p = 0." in hotter.how


@pytest.mark.parametrize("count", [30, 100])
def test_few_answers_make_right_scores_worse_by_less_than_a_hundredth_on_average(count: int) -> None:
    worse = []
    others, more = honest(20_000, seed=10_000)
    before = expected_calibration_error(others, list(expit(more)))
    for seed in range(200):
        labels, logits = honest(count, seed)
        after = fit_scale(labels, list(logits)).scores(more)
        worse.append(expected_calibration_error(others, after) - before)
    assert np.mean(worse) < 0.01


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_few_answers_make_wrong_scores_no_worse_on_average(wrong: Callable[[Floats], Floats]) -> None:
    others, more = honest(20_000, seed=10_000)
    before = expected_calibration_error(others, list(expit(wrong(more))))
    after = []
    for seed in range(100):
        labels, logits = honest(30, seed)
        scale = fit_scale(labels, list(wrong(logits)))
        after.append(expected_calibration_error(others, scale.scores(wrong(more))))
    assert np.mean(after) < before


def rejected(samples: Iterable[tuple[list[bool], Floats, list[str] | None]]) -> float:
    """How often the scores as they are."""
    found = [fit_scale(labels, logits, queries).p_unchanged for labels, logits, queries in samples]
    return float(np.mean([p is not None and p < LEVEL for p in found]))


FIVES = [str(number // 5) for number in range(500)]


def test_answers_to_one_question_that_are_all_alike_are_not_taken_for_many() -> None:
    def five_times(seed: int) -> Sample:
        labels, logits = honest(100, seed)
        return [label for label in labels for _ in range(5)], np.repeat(logits, 5)

    assert rejected((*five_times(seed), FIVES) for seed in range(300)) <= 0.09
    assert rejected((*five_times(seed), None) for seed in range(300)) > 0.4  # what ignoring it would give


def test_answers_to_one_question_that_share_nothing_count_each() -> None:
    assert 0.02 <= rejected((*honest(500, seed), FIVES) for seed in range(300)) <= 0.08
    slightly_off = [honest(500, seed) for seed in range(50)]
    assert rejected((labels, logits + 0.5, FIVES) for labels, logits in slightly_off) > 0.85


def test_a_harmful_and_a_harmless_answer_to_each_question_count_both() -> None:
    dice = np.random.default_rng(0)
    labels = [True, False] * 100
    logits = dice.normal(0, 1, 200) + np.where(labels, 4.0, 0.0)
    queries = [str(number // 2) for number in range(200)]
    assert fit_scale(labels, list(logits), queries) == fit_scale(labels, list(logits))


def test_all_answers_to_one_question_give_a_finite_scale() -> None:
    labels, logits = honest(50, seed=0)
    scale = fit_scale(labels, list(3 * logits), ["one"] * 50)
    assert math.isfinite(scale.temperature)
    assert scale.p_unchanged is not None
    assert 0 <= scale.p_unchanged <= 1


def test_answers_without_a_mistake_give_finite_scores_that_are_not_too_sure() -> None:
    labels = [False] * 50 + [True] * 50
    unsure = fit_scale(labels, [-0.1] * 50 + [0.1] * 50)
    assert chosen(unsure) == "a temperature"
    # 51 of 52, as the smoothed labels say
    assert unsure.scores([0.1]) == pytest.approx([51 / 52], abs=1e-4)
    high = fit_scale(labels, [2.9] * 50 + [3.1] * 50)
    assert chosen(high) == "a temperature and an offset"
    assert high.scores([2.9, 3.1]) == pytest.approx([1 / 52, 51 / 52], abs=1e-4)
    # nothing speaks against scores that are sure and right
    assert fit_scale(labels, [-8.0] * 50 + [8.0] * 50).temperature == 1.0


@pytest.mark.parametrize("size", [1.0, 1e6])
@given(rows=st.lists(st.tuples(st.booleans(), st.floats(-50, 50)), min_size=1, max_size=30))
def test_a_scale_is_finite_and_keeps_the_order_whatever_the_logits(
    size: float, rows: list[tuple[bool, float]]
) -> None:
    labels = [True, False, *(label for label, _ in rows)]
    logits = [size * logit for logit in (1.0, 0.0, *(logit for _, logit in rows))]
    scale = fit_scale(labels, logits)
    assert TEMPERATURES[0] <= scale.temperature <= TEMPERATURES[1]
    assert math.isfinite(scale.offset)
    scores = scale.scores(sorted(logits))
    assert scores == sorted(scores)
    assert all(0 <= score <= 1 for score in scores)


def test_turned_scores_end_at_the_highest_temperature_and_not_turned_round() -> None:
    labels, logits = honest(500, seed=0)
    assert fit_scale(labels, list(-logits)).temperature == pytest.approx(TEMPERATURES[1], rel=1e-3)


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_one_kind_of_label_is_refused_in_one_line(labels: list[bool]) -> None:
    with pytest.raises(InputError, match="both kinds are needed to calibrate") as error:
        fit_scale(labels, [0.5] * len(labels))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="not a finite number"):
        fit_scale([True, False], [bad, 0.0])


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
