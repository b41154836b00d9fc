"""Metrics of a detector and its baselines on the same answers: pure functions of labels, scores and queries.

All intervals are Wilson's on the number of independent answers that a metric is worth; see ``ranking`` for
AUROC and average precision. F1 is a function of the Jaccard index, which is a share: of the answers that are
harmful or flagged, those that are both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mllm_protector.evaluation.measurements import Measurement, of_share
from mllm_protector.evaluation.ranking import Ranking, auroc, average_precisions, difference_limits
from mllm_protector.evaluation.statistics import Ints, share
from mllm_protector.metrics import confusion, detection_metrics
from mllm_protector.records import AnswerPair, LabelledAnswer

RESAMPLES = 2000
WITHOUT_GROUP = "(no group)"
DETECTOR = "detector"
"""The arm of the measured detector; the others are its baselines."""


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
