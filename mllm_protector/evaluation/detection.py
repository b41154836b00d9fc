"""Metrics of a detector and its baselines on the same answers, with their intervals.

All intervals are Wilson's on the number of independent answers that a metric is worth; answers to one query
count as one draw. F1 is a function of the Jaccard index, which is a share: of the answers that are harmful or
flagged, those that are both. AUROC and average precision are worth value (1 - value) over their variance, but
never more than a few answers for each query, because a variance estimated from few answers near 0 or 1 is too
small.

Simulated with harmful answers to 5 to 200 queries (correlation 0 to 0.5) the intervals cover in these shares
of samples: AUROC of .58 to .997 in 93 % to 99 %, average precision in 94 % to 100 %, and their differences in
93 % to 100 % (that of average precision in 90 % with harmful answers to only 5 queries).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mllm_protector.evaluation.measurements import Measurement, of_share
from mllm_protector.evaluation.statistics import Floats, Ints, Limits, share
from mllm_protector.metrics import confusion, detection_metrics
from mllm_protector.records import AnswerPair, LabelledAnswer

RESAMPLES = 2000
WITHOUT_GROUP = "(no group)"
DETECTOR = "detector"
"""The arm of the measured detector; the others are its baselines."""

AUROC_WORTH = 4
"""Independent answers that an AUROC is worth at most, for each query of the rarer label."""

CHUNK = 8_000_000
"""Weights that ``cluster_weights`` holds at once."""

Flags = NDArray[np.bool_]


def differing_pairs(records: Sequence[AnswerPair | LabelledAnswer]) -> list[tuple[int, int]]:
    """The places of the accepted and the rejected answer of each pair with two different labels."""
    pairs, place = [], 0
    for record in records:
        if isinstance(record, LabelledAnswer):
            place += 1
            continue
        if record.accepted_harmful != record.rejected_harmful:
            pairs.append((place, place + 1))
        place += 2
    return pairs


def ranking_metrics(
    labels: Sequence[bool], columns: Mapping[str, Sequence[float]], clusters: Ints, *, seed: int
) -> Iterator[Measurement]:
    """``auroc`` and ``average_precision`` of each arm, and the detector's difference to each other arm.

    Args:
        labels: True for harmful; both kinds occur.
        columns: arm -> P(harmful) of each answer.
        clusters: (N,) from 0 without gaps; answers to one query have the same number.
        seed: of the bootstrap.
    """
    harm = np.array(labels, dtype=bool)
    arrays = {name: np.array(scores, dtype=np.float64) for name, scores in columns.items()}
    rankings: dict[str, dict[str, Ranking]] = {
        "auroc": {name: auroc(harm, scores, clusters) for name, scores in arrays.items()},
        "average_precision": average_precisions(harm, arrays, clusters, resamples=RESAMPLES, seed=seed),
    }
    exact = {name: detection_metrics(labels, scores, threshold=0.5) for name, scores in columns.items()}
    n = len(labels)
    for metric, of_arm in rankings.items():
        for arm, ranking in of_arm.items():
            low, high = ranking.limits
            yield Measurement(arm=arm, metric=metric, value=exact[arm][metric], low=low, high=high, n=n)
        for arm in (name for name in columns if name != DETECTOR):
            low, high = difference_limits(of_arm[DETECTOR], of_arm[arm])
            difference = exact[DETECTOR][metric] - exact[arm][metric]
            yield Measurement(
                arm=arm,
                metric=f"{metric}_difference",
                value=difference,
                low=low,
                high=high,
                n=n,
                method="detector minus this arm; square-and-add",
            )


def pairwise_accuracy(
    columns: Mapping[str, Sequence[float]], clusters: Ints, pairs: Sequence[tuple[int, int]]
) -> Iterator[Measurement]:
    """How often the answer that should score lower does; ``pairs`` are places of (lower, higher)."""
    of_pairs = clusters[[accepted for accepted, _ in pairs]] if pairs else clusters[:0]
    for arm, scores in columns.items():
        right = np.array([scores[accepted] < scores[rejected] for accepted, rejected in pairs], dtype=bool)
        yield of_share("pairwise_accuracy", share(right, of_pairs), arm=arm)


def calibration_metrics(
    labels: Sequence[bool], columns: Mapping[str, Sequence[float]]
) -> Iterator[Measurement]:
    """``ece`` and ``brier`` of each column of scores."""
    for arm, scores in columns.items():
        found = detection_metrics(labels, scores, threshold=0.5)
        for metric in ("ece", "brier"):
            yield Measurement(arm=arm, metric=metric, value=found[metric], n=len(labels))


def decision_metrics(
    labels: Sequence[bool], flags: Mapping[str, Sequence[bool]], clusters: Ints
) -> Iterator[Measurement]:
    """``tp fp fn tn`` of each arm at its threshold, and the usual rates."""
    harm = np.array(labels, dtype=bool)
    for arm, flagged in flags.items():
        flag = np.array(flagged, dtype=bool)
        counts = confusion(labels, flagged)
        for name in ("tp", "fp", "fn", "tn"):
            yield Measurement(arm=arm, metric=name, value=getattr(counts, name), n=counts.total)
        yield of_share("accuracy", share(harm == flag, clusters), arm=arm)
        yield of_share("precision", share(harm[flag], clusters[flag]), arm=arm)
        yield of_share("recall", share(flag[harm], clusters[harm]), arm=arm)
        yield of_share("false_positive_rate", share(flag[~harm], clusters[~harm]), arm=arm)
        either = harm | flag
        jaccard = share((harm & flag)[either], clusters[either])
        low, high = (None if each is None else 2 * each / (1 + each) for each in (jaccard.low, jaccard.high))
        yield Measurement(
            arm=arm, metric="f1", value=counts.f1, low=low, high=high, n=counts.total, method="Jaccard index"
        )


def group_metrics(
    labels: Sequence[bool],
    columns: Mapping[str, Sequence[float]],
    flagged: Sequence[bool],
    clusters: Ints,
    names: Sequence[str | None],
) -> Iterator[Measurement]:
    """AUROC of each arm and the detector's decisions in each group, by the alphabet.

    There is no AUROC where all answers of a group have one label.
    """
    for group in sorted({name or WITHOUT_GROUP for name in names}):
        inside = np.array([(name or WITHOUT_GROUP) == group for name in names])
        harm = np.array(labels)[inside].tolist()
        flags = {DETECTOR: np.array(flagged)[inside].tolist()}
        rows: list[Measurement] = []
        if 0 < sum(harm) < len(harm):
            for arm, scores in columns.items():
                found = detection_metrics(harm, np.array(scores)[inside].tolist(), threshold=0.5)
                rows.append(Measurement(arm=arm, metric="auroc", value=found["auroc"], n=len(harm)))
        rows += decision_metrics(harm, flags, clusters[inside])
        for row in rows:
            yield replace(row, group=group)


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
        deviation = sign * correction * (wins - wins.mean()) / len(wins)
        deviations += np.bincount(clusters[own], weights=deviation, minlength=len(deviations))
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
