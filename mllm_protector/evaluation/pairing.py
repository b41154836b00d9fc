"""Differences on pairs, such as one answer with and without a guard: pure functions of their values."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_protector.evaluation.statistics import Floats, Ints, by_cluster, macro_interval, macro_mean

FLIPS = 9999
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A comparison on pairs; without pairs the numbers are ``None``.

    Attributes:
        pairs: how many.
        only_before: pairs with the higher value before.
        only_after: pairs with the higher value after.
        value: mean after minus mean before, in [-1, 1].
        low: of its 95 % interval.
        high: of its 95 % interval.
        p: two-sided, that there is no difference.
        test: the test that gave p.
        method: of the interval.
    """

    pairs: int
    only_before: int
    only_after: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: Literal["McNemar", "sign flips"] | None = None
    method: str = "Bonett and Price"


def paired(before: Floats, after: Floats, clusters: Ints) -> Paired:
    """Compare two values of each pair, in [0, 1]: 0 or 1, or averages of such.

    Pairs about one question are not independent, so interval and test use the net change of each question.
    Where every question has one pair of yes or no, the test is McNemar's, exact; else ``sign_flip_test``.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    pairs, change = len(before), after - before
    only_before, only_after = int((change < 0).sum()), int((change > 0).sum())
    if not pairs:
        return Paired(pairs=0, only_before=0, only_after=0)
    sums, sizes = by_cluster(change, clusters)
    low, high = change_interval(sums, sizes)
    exact = len(sizes) == pairs and bool(np.isin(change, (-1, 0, 1)).all())
    table = [[0, only_before], [only_after, 0]]
    p = float(mcnemar(table, exact=True).pvalue) if exact else sign_flip_test(sums)
    return Paired(
        pairs=pairs,
        only_before=only_before,
        only_after=only_after,
        value=float(change.mean()),
        low=low,
        high=high,
        p=p,
        test="McNemar" if exact else "sign flips",
    )


def macro_paired(before: Floats, after: Floats, clusters: Ints, strata: Ints) -> Paired:
    """``paired``, with the mean over strata of their differences: each counts the same, whatever its pairs.

    A cluster lies in one stratum. The interval is ``macro_interval``, the test ``sign_flip_test`` on the
    clusters' shares of the mean. Simulated with the benchmark's scenario sizes it covers the true difference
    in 95 % to 100 % of samples, with 13 questions a scenario in 95 % to 100 % too.
    """
    _, place, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return paired(before, after, clusters)
    rows = [place == number for number in range(len(sizes))]
    found = [paired(before[each], after[each], clusters[each]) for each in rows]
    low, high = macro_interval(found)
    weights = 1 / (len(sizes) * sizes[place])
    return Paired(
        pairs=len(before),
        only_before=sum(each.only_before for each in found),
        only_after=sum(each.only_after for each in found),
        value=macro_mean(each.value for each in found),
        low=low,
        high=high,
        p=sign_flip_test(np.bincount(clusters, weights=weights * (after - before)).astype(np.float64)),
        test="sign flips",
        method="MOVER of Bonett and Price",
    )


def change_interval(sums: Floats, sizes: Floats) -> tuple[float, float]:
    """The 95 % interval of the mean change of pairs in K clusters, from the sum of each cluster's changes.

    That of Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", Journal of Educational and Behavioral Statistics 37: one change up and one down are
    added, so that it has a width where nothing, or everything, changed. Here they are clusters of the mean
    size, the variance is that of a ratio of sums over clusters, and the quantile is Student's.

    Simulated with 10 to 200 clusters of 1 to 3 pairs (correlation 0 to 1) it covers the true difference in
    94 % to 97 % of samples, in up to 100 % where nearly nothing or everything changes. With cluster sizes as
    unequal as 12, 6, 4, 3, ... it covers in 87 % to 94 %.
    """
    from scipy.stats import t

    mean_size = float(sizes.mean())
    totals = np.concatenate([sums, [mean_size, -mean_size]])
    weights = np.concatenate([sizes, [mean_size, mean_size]])
    middle = float(totals.sum() / weights.sum())
    spread = math.sqrt(float(((totals - middle * weights) ** 2).sum())) / float(weights.sum())
    half = float(t.ppf(0.975, len(totals) - 1)) * spread
    return max(middle - half, -1.0), min(middle + half, 1.0)


def sign_flip_test(sums: Floats) -> float:
    """The two-sided p of no difference: how often random signs give as large a total change.

    If a guard changes nothing, the net change of a question is as likely up as down by as much, whatever its
    pairs have in common (Fisher's randomisation test on clusters). Signs are drawn, always from the same
    seed, so p is a multiple of 1 / (``FLIPS`` + 1).
    """
    steps, counts = np.unique(np.round(np.abs(sums[sums != 0]), 9), return_counts=True)
    ups = np.random.default_rng(SEED).binomial(counts, 0.5, size=(FLIPS, len(counts)))
    totals = np.abs((2 * ups - counts) @ steps)
    return float((1 + (totals >= abs(sums.sum()) - 1e-6).sum()) / (1 + FLIPS))
