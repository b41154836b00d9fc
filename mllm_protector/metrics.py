"""Metrics of a detector's scores: pure functions, scikit-learn wherever it has them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from mllm_protector.records import Confusion

Floats = NDArray[np.float64]

DETECTION_METRICS = ("auroc", "average_precision", "accuracy", "f1", "brier", "ece")
"""What ``detection_metrics`` gives."""

HIGHER_IS_BETTER = ("auroc", "average_precision", "accuracy", "f1")
"""Of all other metrics (losses, perplexity, Brier, calibration error) lower is better."""

CALIBRATION_BINS = 15

CHUNK = 8_000_000
"""Weights that ``cluster_weights`` holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Answers whose scores are alike.

    Attributes:
        count: how many.
        harmful: so many of them do harm.
        score: their mean score.
    """

    count: int
    harmful: int
    score: float


def detection_metrics(
    labels: Sequence[bool], scores: Sequence[float], *, threshold: float
) -> dict[str, float]:
    """How well scores tell harmful answers (positive) from harmless ones.

    Args:
        labels: True for harmful; both kinds must occur.
        scores: P(harmful) in [0, 1].
        threshold: scores at or above it count as harmful in accuracy and F1.

    Returns:
        ``auroc``, ``average_precision``, ``accuracy``, ``f1``, ``brier``, ``ece``.

    Raises:
        ValueError: only one kind of label.
    """
    if len(set(labels)) < 2:
        raise ValueError("both harmful and harmless answers are needed to measure a detector")
    flagged = [score >= threshold for score in scores]
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
        "accuracy": float(accuracy_score(labels, flagged)),
        "f1": float(f1_score(labels, flagged, zero_division=0.0)),
        "brier": float(brier_score_loss(labels, scores)),
        "ece": expected_calibration_error(labels, scores),
    }


def confusion(labels: Sequence[bool], flagged: Sequence[bool]) -> Confusion:
    """Count what flagging does.

    Args:
        labels: True for harmful.
        flagged: whether each answer is treated as harmful.
    """
    harm, flag = np.asarray(labels, dtype=bool), np.asarray(flagged, dtype=bool)
    tn, fp, fn, tp = confusion_matrix(harm, flag, labels=[False, True]).ravel().tolist()
    return Confusion(tp=tp, fp=fp, fn=fn, tn=tn)


def cluster_weights(clusters: Any, *, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each answer stands in a bootstrap sample that draws whole clusters.

    Answers to one query are not independent, so a query is drawn with all its answers or not at all.

    Args:
        clusters: (N,) the cluster of each answer, from 0 and without gaps.
        resamples: B, how many samples.
        seed: of the draws.

    Yields:
        (b, N) weights, a few samples at a time; B rows in all.
    """
    clusters = np.asarray(clusters)
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1
    step = max(1, CHUNK // len(clusters))
    for start in range(0, resamples, step):
        samples = min(step, resamples - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=samples)
        yield drawn[:, clusters].astype(np.float64)


def weighted_average_precision(labels: Any, scores: Any, weights: Floats) -> Floats:
    """Average precision under many weightings at once: scikit-learn's metric, sorted only once.

    Args:
        labels: (N,) True for harmful.
        scores: (N,) higher means more harmful; equal scores are a tie.
        weights: (B, N), such as ``cluster_weights``.

    Returns:
        (B,) NaN where a weighting leaves one kind of label only.
    """
    harm, score = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    sorted_weights = weights[:, order]
    tp = np.cumsum(sorted_weights * harm[order], axis=1)[:, ends]
    fp = np.cumsum(sorted_weights * ~harm[order], axis=1)[:, ends]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(tp / (tp + fp))
        average: Floats = (np.diff(tp, prepend=0.0) * precision).sum(axis=1) / tp[:, -1]
    average[fp[:, -1] == 0] = np.nan
    return average


def calibration_bins(
    labels: Sequence[bool], scores: Sequence[float], *, bins: int = CALIBRATION_BINS
) -> list[CalibrationBin]:
    """Equally wide bins of scores in [0, 1], from the lowest; empty ones are left out."""
    harm, probability = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    where = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    return [
        CalibrationBin(
            count=int(inside.sum()), harmful=int(harm[inside].sum()), score=float(probability[inside].mean())
        )
        for index in range(bins)
        if (inside := where == index).any()
    ]


def expected_calibration_error(
    labels: Sequence[bool], scores: Sequence[float], *, bins: int = CALIBRATION_BINS
) -> float:
    """The mean gap between score and frequency over equally wide bins, weighted by their size.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3, with 15
    bins, for the probability of the positive class.
    """
    filled = calibration_bins(labels, scores, bins=bins)
    return sum(each.count / len(labels) * abs(each.harmful / each.count - each.score) for each in filled)


def perplexity(loss: float) -> float:
    """The exponential of a mean loss per token in nats; capped so that it stays a number in JSON."""
    return math.exp(min(loss, 80.0))
