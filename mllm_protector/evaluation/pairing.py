"""The difference between two rates of the same questions, and a rate without the errors of its judge."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_protector.evaluation.statistics import Floats, Ints
from mllm_protector.records import Confusion

FLIPS = 9999
SEED = 0

Test = Literal["McNemar", "sign flips"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """What a comparison on pairs says; all numbers are ``None`` if there were no pairs.

    Attributes:
        pairs: how many.
        only_before: pairs with the higher value before.
        only_after: pairs with the higher value after.
        difference: mean after minus mean before, in [-1, 1].
        low: of its 95 % interval.
        high: of its 95 % interval.
        p: two-sided, that there is no difference.
        test: which one gave p.
    """

    pairs: int
    only_before: int
    only_after: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: Test | None = None


def paired(before: Floats, after: Floats, clusters: Ints) -> Paired:
    """Compare two values of each pair.

    Pairs about one question are not independent, so interval and test go by the net change of each question.
    Where every question has one pair of yes or no, the test is McNemar's, exact; elsewhere see
    ``sign_flip_test``.

    Args:
        before: (N,) in [0, 1]: 0 or 1, or averages of such.
        after: (N,) likewise.
        clusters: (N,) the cluster of each pair, from 0.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    pairs = len(before)
    change = after - before
    only_before, only_after = int((change < 0).sum()), int((change > 0).sum())
    if not pairs:
        return Paired(pairs=0, only_before=0, only_after=0)
    sizes = np.bincount(clusters)
    sums = np.bincount(clusters, weights=change)[sizes > 0].astype(np.float64)
    sizes = sizes[sizes > 0]
    low, high = change_interval(sums, sizes)
    if len(sizes) == pairs and np.isin(change, (-1, 0, 1)).all():
        test: Test = "McNemar"
        p = float(mcnemar([[0, only_before], [only_after, 0]], exact=True).pvalue)
    else:
        test, p = "sign flips", sign_flip_test(sums)
    return Paired(
        pairs=pairs,
        only_before=only_before,
        only_after=only_after,
        difference=float(change.mean()),
        low=low,
        high=high,
        p=p,
        test=test,
    )


def change_interval(sums: Floats, sizes: Ints) -> tuple[float, float]:
    """The 95 % interval of the mean change of pairs in clusters.

    That of Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", Journal of Educational and Behavioral Statistics 37: one change up and one down are
    added, so that it has a width where nothing, or everything, changed. Here they are clusters of the mean
    size, the variance is that of a ratio of sums over clusters, and the quantile is Student's.

    Simulated with 10 to 200 clusters of 1 to 3 pairs (correlation 0 to 1) it covers the true difference in
    94 % to 97 % of samples, in up to 100 % where nearly nothing or everything changes. With cluster sizes as
    unequal as 12, 6, 4, 3, ... it covers in 87 % to 94 %.

    Args:
        sums: (K,) of each cluster's changes, each in [-1, 1].
        sizes: (K,) of the clusters, at least one.
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

    Args:
        sums: (K,) of each cluster's changes.
    """
    steps, counts = np.unique(np.round(np.abs(sums[sums != 0]), 9), return_counts=True)
    ups = np.random.default_rng(SEED).binomial(counts, 0.5, size=(FLIPS, len(counts)))
    totals = np.abs((2 * ups - counts) @ steps)
    return float((1 + (totals >= abs(sums.sum()) - 1e-6).sum()) / (1 + FLIPS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """A corrected share with its 95 % interval, and what it was corrected with."""

    value: float
    low: float
    high: float
    sensitivity: float
    specificity: float


def corrected(share: float, total: float, bias: Confusion) -> Corrected | None:
    """What share a judge without errors would have found (Rogan and Gladen 1978, Am J Epidemiol 107).

    The interval is that of Lang and Reiczigel 2014, "Confidence limits for prevalence of disease adjusted for
    estimated sensitivity and specificity", Preventive Veterinary Medicine 113, equation 16: it also counts
    that the judge's sensitivity and specificity are estimates. Simulated with 50 to 400 labelled answers of
    each kind it covers in 94 % to 97 % of samples.

    It takes for granted that the judge errs on these answers as often as on those its errors were counted on.

    Args:
        share: found harmful by the judge.
        total: of so many independent answers.
        bias: the judge's errors.

    Returns:
        ``None`` where the correction says nothing: the errors on harmful or on safe answers were never
        counted, the judge does no better than chance, or the whole interval lies outside [0, 1], so that the
        errors evidently belong to answers of another kind.
    """
    from scipy.stats import norm

    harmful, safe = bias.tp + bias.fn, bias.fp + bias.tn
    if not harmful or not safe:
        return None
    sensitivity, specificity = bias.tp / harmful, bias.tn / safe
    # Primed in the paper: pulled towards one half, so that no variance is 0.
    z = float(norm.ppf(0.975))
    size = total + z**2
    apparent = (total * share + z**2 / 2) / size
    primed, primed_specificity = (bias.tp + 1) / (harmful + 2), (bias.tn + 1) / (safe + 2)
    if sensitivity + specificity <= 1 or primed + primed_specificity <= 1:
        return None
    youden = primed + primed_specificity - 1
    middle = (apparent + primed_specificity - 1) / youden
    spread = primed * (1 - primed) / (harmful + 2)
    other_spread = primed_specificity * (1 - primed_specificity) / (safe + 2)
    shift = 2 * z**2 * (middle * spread - (1 - middle) * other_spread)
    variance = apparent * (1 - apparent) / size + middle**2 * spread + (1 - middle) ** 2 * other_spread
    half = z * math.sqrt(variance) / youden
    low, high = middle + shift - half, middle + shift + half
    if high <= 0 or low >= 1:
        return None
    value = (share + specificity - 1) / (sensitivity + specificity - 1)
    return Corrected(
        value=min(max(value, 0.0), 1.0),
        low=max(low, 0.0),
        high=min(high, 1.0),
        sensitivity=sensitivity,
        specificity=specificity,
    )
