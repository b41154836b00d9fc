import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from mllm_protector.evaluation.detection import auroc, average_precisions, difference_limits


def test_the_values_are_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random(90) < 0.3, np.round(rng.random(90), 1)
    assert auroc(labels, scores, np.arange(90)).value == pytest.approx(roc_auc_score(labels, scores))
    found = average_precisions(labels, {"one": scores}, np.arange(90), resamples=10, seed=0)["one"]
    assert found.value == pytest.approx(average_precision_score(labels, scores))


def test_the_variance_of_an_auroc_is_delongs() -> None:
    rng = np.random.default_rng(0)
    labels, scores = np.arange(60) < 20, rng.normal(size=60)
    wins = (scores[labels][:, None] > scores[~labels][None]).astype(float)
    expected = wins.mean(axis=1).var(ddof=1) / 20 + wins.mean(axis=0).var(ddof=1) / 40
    deviations = auroc(labels, scores, np.arange(60)).deviations
    assert deviations @ deviations == pytest.approx(expected)


def test_copies_of_the_answers_to_a_query_make_nothing_surer() -> None:
    rng = np.random.default_rng(0)
    labels, scores, names = (
        np.arange(60) < 20,
        rng.normal(size=60) + 1.0 * (np.arange(60) < 20),
        np.arange(60),
    )
    once = auroc(labels, scores, names)
    thrice = auroc(np.tile(labels, 3), np.tile(scores, 3), np.tile(names, 3))
    assert thrice.limits == pytest.approx(once.limits)


def test_a_perfect_order_of_few_answers_keeps_its_doubt_and_a_single_one_says_nothing() -> None:
    labels, scores = np.arange(40) < 8, np.arange(40)[::-1].astype(float)
    low, high = auroc(labels, scores, np.arange(40)).limits
    assert (low, high) == (pytest.approx(0.893, abs=0.001), 1.0)
    [precision] = average_precisions(labels, {"a": scores}, np.arange(40), resamples=50, seed=0).values()
    assert precision.limits == (pytest.approx(0.676, abs=0.001), 1.0)
    alone = np.arange(40) < 1
    assert auroc(alone, scores, np.arange(40)).limits == (None, None)
    [precision] = average_precisions(alone, {"a": scores}, np.arange(40), resamples=50, seed=0).values()
    assert precision.limits == (None, None)


def test_intervals_of_auroc_and_of_differences_cover_with_few_harmful_answers() -> None:
    rng, rounds = np.random.default_rng(0), 300
    for queries, each, distance in ((325, 1, 1.5), (325, 1, 2.8), (65, 5, 2.8), (32, 1, 1.5)):
        clusters, share = np.repeat(np.arange(queries), each), 16 / (queries * each)
        alone = both = counted = 0
        better = distance * 1.2
        truth, other = norm.cdf([distance / 2**0.5, better / 2**0.5])
        for _ in range(rounds):
            labels = rng.random(len(clusters)) < share
            if not 4 <= labels.sum() <= len(labels) - 4:
                continue
            common, own, more = (rng.normal(size=queries)[clusters], *rng.normal(size=(2, len(clusters))))
            noise = (common + own) / 2**0.5
            scores = noise + distance * labels
            others = 0.8 * noise + 0.6 * more + better * labels
            one, two = auroc(labels, scores, clusters), auroc(labels, others, clusters)
            low, high = one.limits
            down, up = difference_limits(one, two)
            assert low is not None
            assert high is not None
            assert down is not None
            assert up is not None
            counted += 1
            alone += low <= truth <= high
            both += down <= truth - other <= up
        assert alone / counted > 0.92, (queries, each, distance, alone / counted)
        assert both / counted > 0.92, (queries, each, distance, both / counted)
