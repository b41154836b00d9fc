"""Shares, their means, agreement: pure functions of counts and verdicts.

Every interval is 95 % and has a width at 0/n and at n/n, which is where safety numbers lie and where a
bootstrap says that nothing is uncertain.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mllm_protector.records import Confusion

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Limits = tuple[float, float] | tuple[None, None]
"""The lower and the upper one of an interval, if there is any."""

FEW = 5
"""Where fewer clusters than this differ from the others, their spread is not estimated (see its uses)."""

ENOUGH = 20
"""With fewer clusters than this a mean of anything but yes and no has no interval."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """``count`` of ``total`` with its 95 % interval; no limits if there was nothing to count."""

    count: int
    total: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """The share in [0, 1], or ``None`` if there was nothing to count."""
        return self.count / self.total if self.total else None


def proportion(count: int, total: int, effective: float | None = None) -> Proportion:
    """A share with Wilson's score interval.

    It covers the true share in 93 % to 97 % of samples where at least 5 of each kind are expected. Below that
    its coverage swings with the share: 92 % to 98 % from 1 to 5 expected, 84 % to 99 % under 1, on average
    94 % to 96 % (exact, for 20 to 1680 answers).

    ``effective`` is the number of independent answers that they are worth (``effective_size``).

    Raises:
        ValueError: not 0 <= count <= total.
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is not a proportion")
    if total == 0:
        return Proportion(0, 0, None, None)
    scale = 1.0 if effective is None else effective / total
    low, high = share_limits(np.array(count * scale), np.array(total * scale))
    return Proportion(count, total, float(low), float(high))


def share(flags: Any, clusters: Ints) -> Proportion:
    """The share of true flags (N,), with Wilson's interval on the effective number of answers."""
    worth = effective_size(flags.astype(np.float64), clusters) if len(flags) else None
    return proportion(int(flags.sum()), len(flags), worth)


def effective_size(values: Floats, clusters: Ints) -> float:
    """How many independent values a sample in clusters is worth: its size over its design effect.

    The design effect is the cluster-robust variance of the mean over that of independent values, never below
    1 (Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data", Survey Methodology 24, without their factor of t quantiles). Where
    fewer than ``FEW`` clusters stand out from the others, the likeness inside clusters cannot be seen; then
    the sample is worth as many values as it has clusters, the cautious end.

    With 20 to 1680 clusters of 3 values (correlation 0.6), Wilson's interval on this size covers in 94 % to
    97 % of samples, on the bare size in 77 % to 84 % (simulated).
    """
    (sums, sizes), total = by_cluster(values, clusters), len(values)
    if len(sizes) == total:
        return float(total)
    if standing_out(sums / sizes) < FEW:
        return float(len(sizes))
    correction = len(sizes) / (len(sizes) - 1)
    robust = correction * float(((sums - values.mean() * sizes) ** 2).sum()) / total
    return float(min(1.0, values.var() / robust) * total)


def by_cluster(values: Any, clusters: Ints, sizes: Ints | None = None) -> tuple[Floats, Floats]:
    """Of each cluster with any the sum of its values, and that of its sizes, which are 1 by default."""
    sums, totals = (np.bincount(clusters, weights=each).astype(np.float64) for each in (values, sizes))
    return sums[totals > 0], totals[totals > 0]


def standing_out(values: Floats) -> int:
    """How many values differ from the commonest one."""
    return len(values) - int(np.unique(values, return_counts=True)[1].max(initial=0))


def mean_interval(values: Any, clusters: Ints, sizes: Ints | None = None) -> Limits:
    """The 95 % interval of a mean of values in clusters: Student's, with the variance of a ratio of sums.

    With ``sizes`` it is that of the sum of all values over the sum of all sizes.

    Simulated with values as skewed as a log-normal of sigma 1 it covers in 87 % to 97 % of samples of 20
    clusters, in 92 % to 97 % from 50 on. With fewer than ``ENOUGH`` clusters, or where fewer than ``FEW``
    stand out from the others, it would be wrong too often; there is none then.
    """
    from scipy.stats import t

    sums, totals = by_cluster(values, clusters, sizes)
    count, total = len(totals), float(totals.sum())
    if count < ENOUGH or standing_out(np.round(sums / totals, 9)) < FEW:
        return None, None
    mean = float(sums.sum()) / total
    variance = float(((sums - mean * totals) ** 2).sum()) * count / (count - 1) / total**2
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(variance)
    return mean - half, mean + half


def macro_mean(values: Iterable[float | None]) -> float | None:
    """The mean in which each value counts the same, whatever its number of answers.

    ``None`` (a scenario in which nothing was judged) is left out: it is not a zero. If nothing is left,
    the mean is ``None``.
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


class Estimate(Protocol):
    """A number with its limits; ``None`` where nothing was counted."""

    @property
    def value(self) -> float | None: ...  # noqa: D102
    @property
    def low(self) -> float | None: ...  # noqa: D102
    @property
    def high(self) -> float | None: ...  # noqa: D102


def macro_interval(strata: Iterable[Estimate]) -> Limits:
    """The 95 % interval of the ``macro_mean`` of independent proportions, or of differences of such.

    The distances from each value to its limits are added as squares (MOVER: Zou, Huang and Zhang
    2009, "A note on confidence interval estimation for a linear function of binomial proportions",
    Computational Statistics & Data Analysis 53). A normal interval would have no width where all strata are
    0/n. Simulated with the benchmark's scenario sizes, it covers the true mean in 88 % (all shares below
    1 %) to 99 % (one share far from the others) of samples.

    Returns:
        The limits, or two ``None`` if nothing was counted anywhere.
    """
    values, below, above = [], [], []
    for each in strata:
        value, low, high = each.value, each.low, each.high
        if value is not None and low is not None and high is not None:
            values.append(value)
            below.append(value - low)
            above.append(high - value)
    mean = macro_mean(values)
    if mean is None:
        return None, None
    return mean - math.hypot(*below) / len(values), mean + math.hypot(*above) / len(values)


def cohens_kappa(counts: Confusion) -> float | None:
    """Cohen's kappa, the agreement beyond chance; ``None`` where only one label occurs."""
    from statsmodels.stats import inter_rater

    if max(counts.tn, counts.tp) == counts.total:
        return None
    table = [[counts.tn, counts.fn], [counts.fp, counts.tp]]
    return float(inter_rater.cohens_kappa(table, return_results=False))


def fleiss_kappa(harmful: Ints, judges: int) -> float | None:
    """Fleiss' kappa of several judges, from how many of them found each answer harmful, (N,).

    ``None`` where only one label occurs, so that chance alone agrees on everything.
    """
    from statsmodels.stats import inter_rater

    if len(harmful) == 0 or harmful.sum() in (0, judges * len(harmful)):
        return None
    table = np.stack([judges - harmful, harmful], axis=1)
    return float(inter_rater.fleiss_kappa(table, method="fleiss"))


def share_limits(counts: Ints | Floats, totals: Ints | Floats) -> tuple[Floats, Floats]:
    """Wilson's limits of many shares at once; ``counts`` need not be whole, no total is 0."""
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    # Wilson's limit at n/n is exactly 1; rounding can leave it below the share itself.
    low, high = proportion_confint(counts, totals, method="wilson")
    return np.where(counts == 0, 0.0, low), np.where(counts == totals, 1.0, high)
