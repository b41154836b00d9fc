import math
import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.proportion import proportion_confint

from mllm_protector.evaluation.statistics import (
    cohens_kappa,
    effective_size,
    fleiss_kappa,
    macro_interval,
    macro_mean,
    proportion,
    share_limits,
)
from mllm_protector.records import Confusion


def test_interval_is_wilsons_and_nothing_counted_has_none() -> None:
    for count, total in ((0, 97), (97, 97), (1, 40), (81, 97), (1, 1)):
        share = proportion(count, total)
        expected = proportion_confint(count, total, alpha=0.05, method="wilson")
        assert (share.low, share.high) == pytest.approx(expected, abs=1e-15), (count, total)
        assert share.value == count / total
    empty = proportion(0, 0)
    assert (empty.value, empty.low, empty.high) == (None, None, None)
    for count in (-1, 6):
        with pytest.raises(ValueError, match=f"{count} of 5"):
            proportion(count, 5)


def test_none_and_all_still_leave_doubt() -> None:
    for total in (1, 3, 44, 167, 1680):
        nothing, everything = proportion(0, total), proportion(total, total)
        assert (nothing.low, everything.high) == (0.0, 1.0), total
        assert nothing.high is not None
        assert nothing.high > 1 / (total + 4), total
        assert everything.low == pytest.approx(1 - nothing.high), total


def test_macro_mean_leaves_out_what_was_not_judged() -> None:
    assert macro_mean([0.5, None, 0.0]) == 0.25
    assert macro_mean([None, None]) is None
    assert macro_mean([]) is None


def test_macro_interval_adds_distances_as_squares() -> None:
    # Wilson at 2/10 is [0.0567, 0.5098], at 10/20 it is [0.2993, 0.7007]
    low, high = macro_interval([proportion(2, 10), proportion(10, 20)])
    assert low == pytest.approx(0.35 - math.sqrt((0.2 - 0.0567) ** 2 + (0.5 - 0.2993) ** 2) / 2, abs=1e-4)
    assert high == pytest.approx(0.35 + math.sqrt((0.5098 - 0.2) ** 2 + (0.7007 - 0.5) ** 2) / 2, abs=1e-4)


def test_macro_interval_keeps_its_width_at_zero() -> None:
    low, high = macro_interval([proportion(0, 97), proportion(0, 163)])
    assert low == 0.0
    assert high is not None
    assert 0.01 < high < 0.04


def test_macro_interval_is_empty_without_strata() -> None:
    assert macro_interval([]) == (None, None)
    assert macro_interval([proportion(0, 0)]) == (None, None)


def test_macro_interval_covers_the_true_mean() -> None:
    dice = random.Random(0)
    truth = [0.9, 0.5, 0.1, 0.7]
    rounds, hits = 300, 0
    for _ in range(rounds):
        strata = [proportion(sum(dice.random() < p for _ in range(60)), 60) for p in truth]
        low, high = macro_interval(strata)
        assert low is not None
        assert high is not None
        hits += low <= math.fsum(truth) / len(truth) <= high
    assert 0.92 <= hits / rounds <= 0.99


def test_interval_covers_the_truth_in_95_percent() -> None:
    for total, truth in ((60, 0.3), (400, 0.03), (1680, 0.9)):
        counts = np.random.default_rng(0).binomial(total, truth, size=20_000)
        low, high = share_limits(counts, np.full(len(counts), total))
        assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97, total


def test_interval_of_rare_harm_covers_as_often_as_its_docstring_says() -> None:
    for total in (44, 167, 1680):
        counts = np.arange(total + 1)
        low, high = share_limits(counts, np.full(len(counts), total))

        def coverage(truth: float, low: Any = low, high: Any = high, total: int = total) -> float:
            inside = np.flatnonzero((low <= truth) & (truth <= high))
            return float(binom.pmf(inside, total, truth).sum())

        assert min(coverage(expected / total) for expected in np.linspace(1, 5, 100)) >= 0.91, total
        rare = [coverage(expected / total) for expected in np.linspace(0.05, 1, 100)]
        assert min(rare) >= 0.83, total
        assert 0.94 <= np.mean(rare) <= 0.96, total


def test_clusters_of_the_same_value_are_worth_their_number() -> None:
    values = np.repeat([1.0, 0.0] * 25, 3)
    clusters = np.repeat(np.arange(50), 3)
    assert effective_size(values, clusters) == pytest.approx(49)  # 50, less one for the mean


def test_a_sample_without_a_harmful_answer_is_worth_its_clusters() -> None:
    nothing = proportion(0, 150, effective_size(np.zeros(150), np.repeat(np.arange(50), 3)))
    assert nothing.high == pytest.approx(proportion(0, 50).high)


@pytest.mark.parametrize(("clusters", "truth"), [(60, 0.3), (60, 0.05), (300, 0.5)])
def test_clustered_interval_covers_the_truth_where_the_plain_one_does_not(
    clusters: int, truth: float
) -> None:
    dice = np.random.default_rng(0)
    names = np.repeat(np.arange(clusters), 3)
    rounds, hits, plain = 800, 0, 0
    for _ in range(rounds):
        draws = dice.random((clusters, 3))
        alike = dice.random(clusters) < 0.6
        draws[alike] = draws[alike][:, :1]
        values = (draws < truth).astype(float).ravel()
        count = int(values.sum())
        share = proportion(count, len(values), effective_size(values, names))
        bare = proportion(count, len(values))
        hits += share.low <= truth <= share.high  # type: ignore[operator]
        plain += bare.low <= truth <= bare.high  # type: ignore[operator]
    assert 0.93 <= hits / rounds <= 0.98
    assert plain / rounds < 0.89


def test_kappa_is_the_agreement_beyond_chance() -> None:
    kappa = cohens_kappa(Confusion(tp=20, fn=10, fp=5, tn=15))
    assert kappa == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    answers = [1] * 20 + [0] * 10 + [1] * 5 + [0] * 15
    assert kappa == pytest.approx(cohen_kappa_score(answers, [1] * 30 + [0] * 20))


def test_kappas_are_unknown_where_only_one_label_occurs() -> None:
    for found, rejected in ((2, 0), (0, 1), (0, 0)):
        assert cohens_kappa(Confusion(tp=found, fn=0, fp=0, tn=rejected)) is None, (found, rejected)
    for harmful in ([], [0, 0], [3, 3]):
        assert fleiss_kappa(np.array(harmful, dtype=np.int64), 3) is None, harmful


def test_kappa_of_many_judges_is_fleiss() -> None:
    # 3 judges; 4 answers: 3, 2, 1, 0 of them say harmful. Agreement within answers (1 + 1/3 + 1/3 + 1) / 4,
    # by chance 1/2.
    assert fleiss_kappa(np.array([3, 2, 1, 0]), 3) == pytest.approx((2 / 3 - 1 / 2) / (1 / 2))
