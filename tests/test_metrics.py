import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
)

from mllm_protector.evaluation import detection
from mllm_protector.evaluation.detection import cluster_weights, weighted_average_precision
from mllm_protector.metrics import (
    DETECTION_METRICS,
    HIGHER_IS_BETTER,
    calibration_bins,
    confusion,
    detection_metrics,
    expected_calibration_error,
    perplexity,
)

LABELS = [False, False, True, True]
SCORES = [0.1, 0.6, 0.4, 0.9]


def test_the_figures_are_those_computed_by_hand() -> None:
    metrics = detection_metrics(LABELS, SCORES, threshold=0.5)
    assert metrics == pytest.approx(
        {
            "auroc": 3 / 4,  # of the four pairs, only (0.6 harmless, 0.4 harmful) is in the wrong order
            "average_precision": (1 / 1 + 2 / 3) / 2,
            "accuracy": 2 / 4,
            "f1": 1 / 2,
            "brier": (0.1**2 + 0.6**2 + 0.6**2 + 0.1**2) / 4,
            "ece": (0.1 + 0.6 + 0.6 + 0.1) / 4,  # four scores in four different bins
        }
    )


def test_metrics_are_the_announced_ones_and_it_is_known_which_to_raise() -> None:
    right = detection_metrics(LABELS, [0.0, 0.1, 0.9, 1.0], threshold=0.5)
    wrong = detection_metrics(LABELS, [1.0, 0.9, 0.1, 0.0], threshold=0.5)
    assert tuple(right) == DETECTION_METRICS
    assert {name for name in right if right[name] > wrong[name]} == set(HIGHER_IS_BETTER)


def test_a_score_at_the_threshold_counts_as_harmful() -> None:
    assert detection_metrics([False, True], [0.2, 0.7], threshold=0.7)["accuracy"] == 1.0
    assert detection_metrics([False, True], [0.2, 0.7], threshold=0.71)["accuracy"] == 0.5


def test_one_kind_of_label_is_refused() -> None:
    for labels in ([True, True], [False, False]):
        with pytest.raises(ValueError, match="both harmful and harmless"):
            detection_metrics(labels, [0.1, 0.9], threshold=0.5)


def test_the_calibration_error_weighs_each_bin_by_its_size() -> None:
    # Two bins: three scores of 0.25 of which one is harmful, and one of 0.75 that is harmless.
    error = expected_calibration_error([True, False, False, False], [0.25, 0.25, 0.25, 0.75], bins=2)
    assert error == pytest.approx(3 / 4 * abs(1 / 3 - 0.25) + 1 / 4 * 0.75)


def test_the_calibration_error_covers_both_ends_of_the_scale() -> None:
    assert expected_calibration_error([True], [0.0]) == 1
    assert expected_calibration_error([True], [1.0]) == 0


def test_perplexity_is_the_exponential_of_the_loss_and_stays_finite() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert math.isfinite(perplexity(1e9))


def scored(count: int, *, seed: int = 0, ties: bool = False) -> tuple[list[bool], list[float]]:
    dice = np.random.default_rng(seed)
    labels = dice.random(count) < 0.3
    scores = np.clip(dice.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    return labels.tolist(), (np.round(scores, 1) if ties else scores).tolist()


def test_a_confusion_matrix_has_scikit_learns_shares() -> None:
    labels, scores = scored(200)
    for threshold in (0.2, 0.5, 0.9, 2.0):
        flagged = [score >= threshold for score in scores]
        point = confusion(labels, flagged)
        assert point.accuracy == accuracy_score(labels, flagged)
        assert point.f1 == pytest.approx(f1_score(labels, flagged, zero_division=0.0))


def test_weighted_average_precision_is_scikit_learns_under_every_weighting() -> None:
    weights = np.random.default_rng(1).integers(0, 4, size=(20, 80)).astype(float)
    for ties in (False, True):
        labels, scores = scored(80, ties=ties)
        average = weighted_average_precision(np.array(labels), np.array(scores), weights)
        for row, precision in zip(weights, average, strict=True):
            assert precision == pytest.approx(average_precision_score(labels, scores, sample_weight=row))


def test_a_sample_of_one_kind_of_label_has_no_ranking() -> None:
    weights = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    average = weighted_average_precision(np.array([True, False]), np.array([0.9, 0.1]), weights)
    assert np.isnan(average).tolist() == [True, True, False]


def test_the_bootstrap_draws_whole_clusters_and_the_same_ones_for_a_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clusters = np.array([0, 1, 0, 2, 2, 2])

    def drawn(seed: int) -> Any:
        return np.concatenate(list(cluster_weights(clusters, resamples=50, seed=seed)))

    weights = drawn(3)
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert (drawn(3) == weights).all()
    assert (drawn(4) != weights).any()
    monkeypatch.setattr(detection, "CHUNK", 20)
    assert drawn(3).shape == (50, 6)


def test_the_bins_hold_all_answers_and_make_the_calibration_error() -> None:
    labels, scores = scored(300)
    bins = calibration_bins(labels, scores)
    assert sum(each.count for each in bins) == 300
    assert sum(each.harmful for each in bins) == sum(labels)
    gaps = [each.count / 300 * abs(each.harmful / each.count - each.score) for each in bins]
    assert expected_calibration_error(labels, scores) == pytest.approx(sum(gaps))
