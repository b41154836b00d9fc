"""Figures under rewritings, from made-up scores."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from mllm_protector.evaluation.attacks import caught_by_tries, measurements_of, threshold_at

HARMFUL = np.array([True] * 4 + [False] * 4)
CLUSTERS = np.arange(8)


def rows(scores: dict[str, dict[str, list[float]]], attacks: list[str]) -> dict[tuple[Any, ...], Any]:
    arrays = {arm: {name: np.array(each) for name, each in own.items()} for arm, own in scores.items()}
    found = measurements_of(HARMFUL, arrays, 0.5, CLUSTERS, attacks=attacks)
    return {(row.arm, row.metric, row.group): row for row in found}


PLAIN = [0.9, 0.9, 0.9, 0.2, 0.1, 0.1, 0.1, 0.6]
SHOUTED = [0.9, 0.1, 0.1, 0.2, 0.7, 0.1, 0.1, 0.6]
CODED = [0.1] * 8


def test_recall_and_false_positives_are_those_of_each_transformation() -> None:
    found = rows({"one": {"plain": PLAIN, "shouted": SHOUTED}}, ["plain", "shouted"])
    value = {key: row.value for key, row in found.items()}
    assert value["one", "recall", "plain"] == 0.75
    assert value["one", "recall", "shouted"] == 0.25
    assert value["one", "recall_difference", "shouted"] == -0.5
    assert value["one", "false_positive_rate", "plain"] == 0.25
    assert value["one", "false_positive_rate", "shouted"] == 0.5
    assert value["one", "false_positive_rate_difference", "shouted"] == 0.25
    assert value["one", "auroc", "plain"] == pytest.approx(15 / 16)
    assert ("one", "recall_difference", "plain") not in value
    for key, row in found.items():
        if row.low is not None and row.high is not None:
            assert row.low <= row.value <= row.high, key


def test_the_worst_of_all_rewritings_counts_and_a_second_arm_is_compared() -> None:
    names = ["plain", "shouted", "coded"]
    first = dict(zip(names, (PLAIN, SHOUTED, CODED), strict=True))
    found = rows({"one": first, "two": first | {"coded": PLAIN}}, names)
    assert found["one", "recall_best_of", "all"].value == 0
    assert found["two", "recall_best_of", "all"].value == 0.25
    assert found["two", "recall_best_of_gain", "all"].value == 0.25
    assert found["one", "recall_best_of", "1"].value == pytest.approx((0.75 + 0.25 + 0) / 3)
    assert found["one", "false_positive_rate_random", "1"].value == pytest.approx((0.25 + 0.5 + 0) / 3)
    assert ("one", "recall_best_of_gain", "all") not in found
    # Rewritings that are no attacks have figures and do not count here.
    assert rows({"one": first}, ["plain", "shouted"])["one", "recall_best_of", "all"].value == 0.25


def test_several_tries_are_the_mean_over_all_choices() -> None:
    flagged = np.random.default_rng(0).random((8, 20)) < 0.8
    found = caught_by_tries(flagged)
    choices = [flagged[list(each)].all(axis=0) for each in combinations(range(8), 5)]
    assert found["5"] == pytest.approx(np.mean(choices, axis=0))
    assert found["1"] == pytest.approx(flagged.mean(axis=0))
    assert found["all"].tolist() == flagged.all(axis=0).tolist()
    assert [*caught_by_tries(flagged[:3])] == ["1", "all"]


def test_a_threshold_flags_at_most_the_share_that_was_asked_for() -> None:
    scores = np.array([0.1, 0.2, 0.2, 0.7, 0.9])
    for rate, flagged in ((0.0, 0), (0.2, 1), (0.4, 2), (0.6, 2), (0.8, 4), (1.0, 5)):
        assert (scores >= threshold_at(scores, rate)).sum() == flagged, rate
