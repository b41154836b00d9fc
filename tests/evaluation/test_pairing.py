import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar

from mllm_protector.evaluation.pairing import Paired, change_interval, macro_paired, paired, sign_flip_test

Floats = NDArray[np.float64]


def compare(before: list[int], after: list[int], clusters: list[int] | None = None) -> Paired:
    names = np.arange(len(before)) if clusters is None else np.array(clusters)
    return paired(np.array(before, dtype=float), np.array(after, dtype=float), names)


def limits(found: Paired) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def alike(rng: np.random.Generator, questions: int, size: int, correlation: float) -> Floats:
    """(questions, size) uniform numbers, of a question all the same or all independent."""
    drawn = rng.random((questions, size))
    same = rng.random(questions) < correlation
    drawn[same] = drawn[same][:, :1]
    return drawn


def test_difference_counts_who_changed_sides() -> None:
    # 12 both, 20 only before, 4 only after, 14 neither
    before, after = [1] * 32 + [0] * 18, [1] * 12 + [0] * 20 + [1] * 4 + [0] * 14
    found = compare(before, after)
    assert (found.pairs, found.only_before, found.only_after) == (50, 20, 4)
    assert found.value == pytest.approx(-16 / 50)
    assert found.test == "McNemar"
    # two-sided binomial: twice the chance of at most 4 heads in 24
    assert found.p == pytest.approx(2 * sum(math.comb(24, k) for k in range(5)) / 2**24)
    assert found.p == pytest.approx(mcnemar([[12, 20], [4, 14]], exact=True).pvalue)


def test_equal_answers_have_no_difference_but_doubt() -> None:
    found = compare([1] * 10 + [0] * 30, [1] * 10 + [0] * 30)
    assert (found.value, found.p, found.test) == (0.0, 1.0, "McNemar")
    low, high = limits(found)
    assert -0.1 < low == -high < -0.02
    several = compare([1] * 10 + [0] * 30, [1] * 10 + [0] * 30, [n // 2 for n in range(40)])
    assert (several.value, several.p, several.test) == (0.0, 1.0, "sign flips")


def test_everything_repaired_keeps_its_doubt() -> None:
    for size in (1, 3):
        low, high = limits(compare([1] * 40 * size, [0] * 40 * size, [n // size for n in range(40 * size)]))
        assert (low, high) == (-1.0, pytest.approx(-0.857, abs=0.002)), size
    assert limits(compare([1], [0])) == (-1.0, 1.0)


def test_the_interval_is_that_of_bonett_and_price() -> None:
    # 5 and 2 of 30 differ: shares 6/32 and 3/32, with the quantile of 31 degrees of freedom
    found = compare([1] * 5 + [0] * 25, [0] * 5 + [1] * 2 + [0] * 23)
    half = 2.039513 * math.sqrt((6 / 32 + 3 / 32 - (3 / 32) ** 2) / 32)
    assert limits(found) == pytest.approx((-3 / 32 - half, -3 / 32 + half), abs=1e-6)


def test_questions_count_and_not_their_pairs() -> None:
    before, after = [1] * 20 + [0] * 20, [0] * 15 + [1] * 5 + [0] * 20
    once, thrice = compare(before, after), compare(before * 3, after * 3, [*range(40)] * 3)
    assert limits(thrice) == pytest.approx(limits(once))
    assert (once.test, thrice.test) == ("McNemar", "sign flips")
    assert thrice.p == pytest.approx(once.p, abs=3e-4)


def test_the_sign_flip_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    sums = rng.integers(-3, 2, size=12).astype(float)
    exact = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_test(sums) == pytest.approx(exact, abs=0.01)


def test_the_test_holds_its_level_where_answers_to_a_question_are_alike() -> None:
    rng, rounds = np.random.default_rng(0), 400
    for questions in (20, 80, 300):
        names, rejected, naive = np.repeat(np.arange(questions), 3), 0, 0
        for _ in range(rounds):
            before, after = (
                (alike(rng, questions, 3, 0.9) < 0.3).ravel().astype(float) for _ in ("before", "after")
            )
            found = paired(before, after, names)
            assert found.p is not None
            rejected += found.p < 0.05
            naive += mcnemar([[0, found.only_before], [found.only_after, 0]], exact=True).pvalue < 0.05
        error = 3 * math.sqrt(0.05 * 0.95 / rounds)
        assert 0.02 < rejected / rounds < 0.05 + error, (questions, rejected / rounds)
        assert naive / rounds > 0.1, "what taking the rows as independent would give"


def test_the_interval_covers_the_true_difference_as_often_as_its_docstring_says() -> None:
    rng, rounds = np.random.default_rng(1), 300
    for questions in (10, 40):
        for size in (1, 3):
            for correlation in (0.0, 0.6, 1.0) if size > 1 else (0.0,):
                for before, kept, new in ((1, 0.03, 0), (0.985, 0.015, 0), (0.6, 0.05, 0), (0.5, 0.5, 0.02)):
                    truth, hits = before * kept + (1 - before) * new - before, 0
                    sizes = np.full(questions, size)
                    for _ in range(rounds):
                        first = alike(rng, questions, size, correlation) < before
                        second = alike(rng, questions, size, correlation) < np.where(first, kept, new)
                        change = second.astype(float) - first
                        low, high = change_interval(change.sum(axis=1), sizes)
                        hits += low <= truth <= high
                    assert hits / rounds >= 0.91, (questions, size, correlation, before, hits / rounds)


def test_in_a_macro_difference_each_stratum_counts_the_same() -> None:
    before, after = np.repeat([1.0, 1.0], [10, 40]), np.repeat([0.0, 1.0], [10, 40])
    strata = np.repeat([4, 7], [10, 40])
    found = macro_paired(before, after, np.arange(50), strata)
    assert (found.value, found.pairs, found.only_before) == (pytest.approx(-0.5), 50, 10)
    each = [paired(before[some], after[some], np.arange(some.sum())) for some in (strata == 4, strata == 7)]
    assert limits(found) == pytest.approx(
        (
            -0.5 - math.hypot(*(one.value - one.low for one in each)) / 2,
            -0.5 + math.hypot(*(one.high - one.value for one in each)) / 2,
        )
    )
    assert found.p == pytest.approx(2 / 2**10, abs=0.001)  # ten of one sign


def test_one_stratum_is_compared_as_it_is() -> None:
    before, after, clusters = np.ones(12), np.repeat([0.0, 1.0], 6), np.arange(12)
    assert macro_paired(before, after, clusters, np.full(12, 3)) == paired(before, after, clusters)


def test_a_macro_test_weighs_each_change_by_its_stratum() -> None:
    before = np.zeros(44)
    after = np.zeros(44)
    after[:4] = 1  # all of a small stratum: a mean change of a half
    before[4:9] = 1  # five of forty the other way: of a sixteenth
    found = macro_paired(before, after, np.arange(44), np.repeat([0, 1], [4, 40]))
    assert found.value == pytest.approx(0.5 - 0.0625)
    flips = 2 / 2**4  # only the four matter
    assert found.p == pytest.approx(flips, abs=0.01)
