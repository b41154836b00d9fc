"""Intervals of AUROC and average precision, alone and as a difference of two scorers on the same answers.

Both are shares, so both have Wilson's interval on the number of independent answers that they are worth:
value (1 - value) over the variance, but never more than a few for each query, because a variance that is
estimated from few answers near 0 or 1 is too small. Answers to one query count as one draw.

Simulated with harmful answers to 5 to 200 queries (correlation 0 to 0.5) the intervals cover in these shares
of samples: AUROC of .58 to .997 in 93 % to 99 %, average precision in 94 % to 100 %, and their differences in
93 % to 100 % (that of average precision in 90 % with harmful answers to only 5 queries).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mllm_protector.evaluation.statistics import Floats, Ints

AUROC_WORTH = 4
"""Independent answers that an AUROC is worth at most, for each query of the rarer label."""

CHUNK = 8_000_000
"""Weights that ``cluster_weights`` holds at once."""

Flags = NDArray[np.bool_]
Limits = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True, slots=True)
class Ranking:
    """A metric and its deviations: products of deviations add up to variances and covariances.

    Attributes:
        value: in [0, 1].
        deviations: (D,) of each query, or of each bootstrap sample.
        most: independent answers that it is worth at most; 0 if that is unknown.
    """

    value: float
    deviations: Floats
    most: int

    @property
    def limits(self) -> Limits:
        """Of the 95 % interval; none with fewer than two queries of either label."""
        from statsmodels.stats.proportion import proportion_confint

        if not self.most:
            return None, None
        variance = float(self.deviations @ self.deviations)
        worth = float(self.most)
        if variance > 0:
            worth = min(self.value * (1 - self.value) / variance, worth) or worth
        low, high = proportion_confint(self.value * worth, worth, method="wilson")
        return max(min(float(low), self.value), 0.0), min(max(float(high), self.value), 1.0)


def difference_limits(one: Ranking, other: Ranking) -> Limits:
    """The 95 % limits of one metric minus another of the same answers.

    The distances to their own limits are added as squares, less what the two have in common (Zou 2007,
    "Toward using confidence intervals to compare correlations", Psychological Methods 12).
    """
    (low, high), (other_low, other_high) = one.limits, other.limits
    if low is None or high is None or other_low is None or other_high is None:
        return None, None
    spread = math.sqrt(float(one.deviations @ one.deviations) * float(other.deviations @ other.deviations))
    common = float(one.deviations @ other.deviations) / spread if spread > 0 else 0.0

    def distance(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * common * down * up + up**2, 0.0))

    difference = one.value - other.value
    return (
        max(difference - distance(one.value - low, other_high - other.value), -1.0),
        min(difference + distance(high - one.value, other.value - other_low), 1.0),
    )


def auroc(labels: Flags, scores: Floats, clusters: Ints) -> Ranking:
    """How often a harmful answer scores above a harmless one, ties counting half.

    Source of the deviations: DeLong et al. 1988, Biometrics 44; for answers in clusters Obuchowski 1997,
    "Nonparametric analysis of clustered ROC curve data", Biometrics 53.

    Args:
        labels: (N,) True for harmful; both kinds occur.
        scores: (N,) higher means more harmful.
        clusters: (N,) from 0 without gaps; answers to one query have the same number.
    """
    value, deviations, fewest = 0.0, np.zeros(int(clusters.max()) + 1), len(labels)
    for own, sign in ((labels, 1), (~labels, -1)):
        others = np.sort(scores[~own])
        beaten = np.searchsorted(others, scores[own], "left") + np.searchsorted(others, scores[own], "right")
        wins: Floats = beaten / (2 * len(others))
        value = float(wins.mean()) if sign > 0 else value
        queries = len(np.unique(clusters[own]))
        correction = math.sqrt(queries / (queries - 1)) if queries > 1 else 1.0
        share = sign * correction * (wins - wins.mean()) / len(wins)
        deviations += np.bincount(clusters[own], weights=share, minlength=len(deviations))
        fewest = min(fewest, queries)
    return Ranking(value, deviations, AUROC_WORTH * fewest if fewest > 1 else 0)


def average_precisions(
    labels: Flags, columns: Mapping[str, Floats], clusters: Ints, *, resamples: int, seed: int
) -> dict[str, Ranking]:
    """Average precision of several scorers (name -> scores), with deviations from one bootstrap over queries.

    An average precision is worth at most as many answers as there are queries with a harmful one, as in Boyd,
    Eng and Page 2013, "Area under the precision-recall curve: point estimates and confidence intervals".
    """
    drawn: dict[str, list[Floats]] = {name: [] for name in columns}
    for weights in cluster_weights(clusters, resamples=resamples, seed=seed):
        for name, scores in columns.items():
            drawn[name].append(weighted_average_precision(labels, scores, weights))
    fewest = min(len(np.unique(clusters[own])) for own in (labels, ~labels))
    found = {}
    for name, scores in columns.items():
        values = np.concatenate(drawn[name])
        values = values[~np.isnan(values)]  # samples of one label; the same ones for every scorer
        whole = float(weighted_average_precision(labels, scores, np.ones((1, len(labels))))[0])
        spread = (values - values.mean()) / math.sqrt(len(values)) if len(values) else values
        most = len(np.unique(clusters[labels])) if fewest > 1 and len(values) else 0
        found[name] = Ranking(whole, spread, most)
    return found


def cluster_weights(clusters: Ints, *, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each answer is in a bootstrap sample that draws whole clusters.

    Answers to one query are not independent, so a query is drawn with all its answers or not at all.

    Yields:
        (b, N) weights, a few samples at a time; ``resamples`` rows in all.
    """
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1
    step = max(1, CHUNK // len(clusters))
    for start in range(0, resamples, step):
        samples = min(step, resamples - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=samples)
        yield drawn[:, clusters].astype(np.float64)


def weighted_average_precision(labels: Flags, scores: Floats, weights: Floats) -> Floats:
    """scikit-learn's average precision under many weightings (B, N) at once, sorted only once.

    Returns:
        (B,) NaN where a weighting leaves one kind of label only.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    sorted_weights = weights[:, order]
    tp = np.cumsum(sorted_weights * labels[order], axis=1)[:, ends]
    fp = np.cumsum(sorted_weights * ~labels[order], axis=1)[:, ends]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(tp / (tp + fp))
        average: Floats = (np.diff(tp, prepend=0.0) * precision).sum(axis=1) / tp[:, -1]
    average[fp[:, -1] == 0] = np.nan
    return average
