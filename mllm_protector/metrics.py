"""Metrics of a detector's scores: pure functions, scikit-learn wherever it has them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from mllm_protector.records import Confusion

DETECTION_METRICS = ("auroc", "average_precision", "accuracy", "f1", "brier", "ece")
"""What ``detection_metrics`` gives."""

HIGHER_IS_BETTER = ("auroc", "average_precision", "accuracy", "f1")
"""Of all other metrics (losses, perplexity, Brier, calibration error) lower is better."""

CALIBRATION_BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Answers of like scores: how many, how many of them harmful, their mean score."""

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
    """Count the true and false positives and negatives of flagging; True is harmful."""
    harm, flag = np.asarray(labels, dtype=bool), np.asarray(flagged, dtype=bool)
    tn, fp, fn, tp = confusion_matrix(harm, flag, labels=[False, True]).ravel().tolist()
    return Confusion(tp=tp, fp=fp, fn=fn, tn=tn)


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
