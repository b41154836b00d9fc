import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import beta, norm

from mllm_protector.errors import InputError
from mllm_protector.guard.calibration import Aim, Sizes, choose_threshold, describe

STRICT = Aim("false_positive_rate", 0.05)
THOROUGH = Aim("recall", 0.9)

Sample = tuple[list[bool], NDArray[np.float64]]


def separate(count: int, seed: int, distance: float = 2.0) -> Sample:
    """Harmless answers around 0, and a third of harmful ones a distance above them."""
    rng = np.random.default_rng(seed)
    harmful = rng.random(count) < 1 / 3
    return list(map(bool, harmful)), rng.normal(0, 1, count) + distance * harmful


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_one_kind_of_label_is_refused_in_one_line(labels: list[bool]) -> None:
    with pytest.raises(InputError, match="both kinds are needed to calibrate") as error:
        choose_threshold(labels, [0.5] * len(labels), STRICT)
    assert "\n" not in str(error.value)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="not a finite number"):
        choose_threshold([True, False], [math.nan, 0.0], STRICT)


def true_false_positive_rate(threshold: float) -> float:
    """Of ``separate``: harmless scores are sigmoids of standard normal logits."""
    return float(norm.sf(np.log(threshold / (1 - threshold))))


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_the_false_positive_rate_stays_under_its_target_in_95_of_100_samples_but_not_far(
    target: float,
) -> None:
    rates = []
    for seed in range(400):
        labels, logits = separate(600, seed)
        choice = choose_threshold(labels, list(expit(logits)), Aim("false_positive_rate", target))
        assert choice.facts["promised"]
        rates.append(true_false_positive_rate(choice.threshold))
    assert np.mean(np.array(rates) <= target) >= 0.95
    assert np.mean(rates) > target / 3


def test_the_recall_stays_over_its_target_in_95_of_100_samples() -> None:
    kept = []
    for seed in range(400):
        labels, logits = separate(600, seed)
        choice = choose_threshold(labels, list(expit(logits)), THOROUGH)
        assert choice.facts["promised"]
        logit = np.log(choice.threshold / (1 - choice.threshold))
        kept.append(norm.sf(logit - 2.0) >= 0.9)
    assert np.mean(kept) >= 0.95


@pytest.mark.parametrize("aim", [STRICT, THOROUGH, Aim("f1", None)])
def test_both_bounds_hold_in_95_of_100_samples_whatever_the_threshold_was_chosen_for(aim: Aim) -> None:
    kept = {"false_positive_rate": 0, "recall": 0}
    for seed in range(200):
        labels, logits = separate(300, seed)
        choice = choose_threshold(labels, list(expit(logits)), aim)
        logit = np.log(choice.threshold / (1 - choice.threshold))
        kept["false_positive_rate"] += norm.sf(logit) <= choice.facts["false_positive_rate_bound"]
        kept["recall"] += norm.sf(logit - 2.0) >= choice.facts["recall_bound"]
    assert min(kept.values()) >= 0.95 * 200


def test_a_lower_threshold_would_break_the_promise_and_a_higher_one_finds_less() -> None:
    labels, logits = separate(600, seed=1)
    scores = list(expit(logits))
    choice = choose_threshold(labels, scores, STRICT)
    next_alarm = max(
        score
        for score, harmful in zip(scores, labels, strict=True)
        if not harmful and score < choice.threshold
    )
    lower = choose_threshold(labels, scores, Aim("fixed", next_alarm))
    assert lower.facts["false_positive_rate_bound"] > 0.05 >= choice.facts["false_positive_rate_bound"]


def test_a_laxer_target_never_gives_a_stricter_threshold() -> None:
    for seed in range(20):
        labels, logits = separate(400, seed)
        scores = list(expit(logits))
        for kind, targets in (
            ("false_positive_rate", (0.02, 0.05, 0.1, 0.3)),
            ("recall", (0.5, 0.8, 0.9, 0.97)),
        ):
            found = [choose_threshold(labels, scores, Aim(kind, target)).threshold for target in targets]
            assert found == sorted(found, reverse=True), (seed, kind)
        aims = [Aim("false_positive_rate", 0.1, confidence) for confidence in (0.99, 0.9, 0.5)]
        surer = [choose_threshold(labels, scores, aim).threshold for aim in aims]
        assert surer == sorted(surer, reverse=True), seed


def test_too_few_harmless_answers_promise_nothing_and_the_choice_says_how_many_are_needed() -> None:
    labels, scores = [False] * 58 + [True] * 5, [0.1] * 58 + [0.9] * 5
    choice = choose_threshold(labels, scores, STRICT)
    assert choice.facts["promised"] is False
    assert choice.how.startswith("a false positive rate of at most 0.05 cannot be promised")
    assert choice.how.endswith("at least 59 harmless answers are needed")
    # neither above all scores nor among the harmless ones
    assert (choice.threshold, choice.facts["recall"]) == (0.5, 1.0)
    assert choose_threshold([False, *labels], [0.1, *scores], STRICT).facts["promised"] is True


def test_a_harmless_answer_on_top_of_all_leaves_a_threshold_that_flags_something() -> None:
    labels, scores = [False] * 60 + [True] * 5, [0.1] * 59 + [0.95] + [0.9] * 5
    choice = choose_threshold(labels, scores, STRICT)
    assert choice.facts["promised"] is False
    assert "cannot be promised" in choice.how
    assert "needed" not in choice.how
    assert 0.1 < choice.threshold < 0.9


def test_too_few_harmful_answers_promise_no_recall_and_all_of_them_are_flagged() -> None:
    labels, scores = [True] * 10 + [False] * 30, [0.7] * 10 + [0.2] * 20 + [0.9] * 10
    choice = choose_threshold(labels, scores, THOROUGH)
    assert choice.facts["promised"] is False
    assert choice.how.endswith("at least 29 harmful answers are needed")
    assert (choice.facts["recall"], choice.facts["false_positive_rate"]) == (1.0, pytest.approx(1 / 3))


@pytest.mark.parametrize("aim", [STRICT, THOROUGH, Aim("f1", None), Aim("fixed", 0.3)])
@pytest.mark.parametrize("score", [0.0, 5e-324, 0.5, 1.0])
def test_equal_scores_are_flagged_together_and_the_threshold_is_a_score(aim: Aim, score: float) -> None:
    labels = [True, False] * 40
    choice = choose_threshold(labels, [score] * 80, aim)
    assert 0 <= choice.threshold <= 1
    flagged = score >= choice.threshold
    assert choice.facts["recall"] == choice.facts["false_positive_rate"] == float(flagged)


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.2 + 1e-16, 0.5, 1 - 1e-16, 1.0]))),
    st.sampled_from([STRICT, THOROUGH, Aim("f1", None), Aim("fixed", 0.5), Aim("false_positive_rate", 0.6)]),
)
def test_the_figures_are_those_of_the_threshold_that_is_given(
    rows: list[tuple[bool, float]], aim: Aim
) -> None:
    rows = [(True, 0.5), (False, 0.2), *rows]
    labels, scores = [label for label, _ in rows], [score for _, score in rows]
    choice = choose_threshold(labels, scores, aim)
    found = sum(label and score >= choice.threshold for label, score in rows)
    alarms = sum(not label and score >= choice.threshold for label, score in rows)
    positives = sum(labels)
    again = describe(
        aim,
        choice.threshold,
        recall=found / positives,
        false_positive_rate=alarms / (len(rows) - positives),
        f1=2 * found / (found + alarms + positives),
        sizes=Sizes.of(labels, None),
    )
    assert choice == again
    assert json.loads(json.dumps(choice.facts)) == choice.facts
    assert choice.facts["false_positive_rate"] <= choice.facts["false_positive_rate_bound"] <= 1
    assert 0 <= choice.facts["recall_bound"] <= choice.facts["recall"]


def test_rounding_moves_no_answer_across_the_threshold() -> None:
    choice = choose_threshold([False, False, True, True], [0.1, 0.2, 0.6, 0.9], Aim("f1", None))
    assert choice.threshold == pytest.approx(0.4)
    assert choice.facts["f1"] == 1.0


def test_the_best_f1_is_the_best_of_all_thresholds() -> None:
    labels, logits = separate(200, seed=3, distance=1.0)
    scores = list(expit(logits))
    best = choose_threshold(labels, scores, Aim("f1", None)).facts["f1"]
    assert best == max(choose_threshold(labels, scores, Aim("fixed", score)).facts["f1"] for score in scores)


def test_a_fixed_threshold_is_kept_and_counts_what_is_at_it() -> None:
    choice = choose_threshold([False, True], [0.3, 0.3], Aim("fixed", 0.3))
    assert (choice.threshold, choice.how, choice.facts["recall"]) == (0.3, "fixed", 1.0)


def test_the_bound_is_the_exact_one() -> None:
    """No false alarm among n: the bound is 1 - 0.05 ** (1 / n), unless the threshold could have had one."""
    labels, scores = [False] * 100 + [True] * 100, [0.1] * 100 + [0.9] * 100
    fixed = choose_threshold(labels, scores, Aim("fixed", 0.5)).facts
    assert fixed["false_positive_rate_bound"] == pytest.approx(1 - 0.05 ** (1 / 100))
    assert fixed["recall_bound"] == pytest.approx(0.05 ** (1 / 100))
    # of 100, one false alarm passes at 5 %, and four misses at 10 %
    facts = choose_threshold(labels, scores, STRICT).facts
    assert facts["false_positive_rate_bound"] == pytest.approx(beta.ppf(0.95, 2, 99))
    assert facts["recall_bound"] == pytest.approx(1 - math.sqrt(math.log(20) / 200))
    thorough = choose_threshold(labels, scores, THOROUGH).facts
    assert thorough["recall_bound"] == pytest.approx(1 - beta.ppf(0.95, 5, 96))


def test_an_impossible_aim_is_refused_in_one_line() -> None:
    aims: list[tuple[Any, float | None, str]] = [
        ("false_positive_rate", 1.5, "target=1.5: false_positive_rate takes a number between 0 and 1"),
        ("false_positive_rate", 0.0, "target=0.0: "),
        ("fixed", True, "target=True: "),
        ("recall", None, "target=None: recall takes"),
        ("recall", 1.0, "target=1.0: "),
        ("recall", math.nan, "target=nan: "),
        ("fixed", -0.1, "target=-0.1: "),
        ("f1", 0.5, "target=0.5: f1 takes none"),
    ]
    for kind, target, message in aims:
        with pytest.raises(InputError, match=f"^{message}[^\n]*$"):
            Aim(kind, target)
    with pytest.raises(InputError, match=r"^confidence=1\.0: must be"):
        Aim("f1", None, 1.0)


def test_answers_to_one_question_count_once_in_a_bound() -> None:
    labels, scores = [True] * 4 + [False] * 40, [0.9] * 4 + [0.1] * 40
    alone = choose_threshold(labels, scores, Aim("false_positive_rate", 0.1), [str(n) for n in range(44)])
    plain = choose_threshold(labels, scores, Aim("false_positive_rate", 0.1))
    fives = [str(n // 5) for n in range(44)]
    shared = choose_threshold(labels, scores, Aim("false_positive_rate", 0.1), fives)
    assert alone == plain
    assert plain.facts["promised"] is True
    assert shared.facts["independent_negatives"] == len(set(fives[4:]))
    assert shared.facts["promised"] is False
    assert "at least 29 harmless answers are needed" in shared.how


def test_the_promise_holds_where_a_few_questions_have_most_of_the_answers() -> None:
    rng, queries = np.random.default_rng(0), 200
    sizes = np.maximum(1, queries // np.arange(1, queries + 1))
    of = np.repeat(np.arange(queries), sizes)
    names, labels = [str(each) for each in of] + ["harmful"], [False] * len(of) + [True]
    for correlation in (0.95, 0.0):
        by_query = by_answer = 0
        for _ in range(150):
            common, own = rng.normal(size=queries)[of], rng.normal(size=len(of))
            logits = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
            scores = [*expit(logits).tolist(), 1.0]
            choice = choose_threshold(labels, scores, Aim("false_positive_rate", 0.1), names)
            assert choice.facts["promised"]
            by_query += true_false_positive_rate(choice.threshold) > 0.1
            worth = choose_threshold(labels, scores, Aim("false_positive_rate", 0.1))
            by_answer += true_false_positive_rate(worth.threshold) > 0.1
        assert by_query / 150 <= 0.05 + 0.02, correlation
        if correlation:
            assert by_answer / 150 > 0.2, "what counting answers would give"


def test_the_reported_bound_holds_where_scores_are_tied() -> None:
    rng = np.random.default_rng(0)
    for levels in (10, 33):
        broken, rounds = 0, 800
        for _ in range(rounds):
            scores = np.floor(rng.random(200) * levels) / levels
            aim = Aim("false_positive_rate", 0.2)
            choice = choose_threshold([False] * 200 + [True], [*scores.tolist(), 1.0], aim)
            true = 1 - math.ceil(choice.threshold * levels) / levels
            broken += true > choice.facts["false_positive_rate_bound"] + 1e-9
        assert broken / rounds <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds), levels


def test_each_question_counts_once_in_a_rate() -> None:
    # Nine alarms on one question of nine answers are one of eleven questions, not nine of nineteen answers.
    labels, scores = [False] * 19 + [True], [0.9] * 9 + [0.1] * 10 + [0.95]
    queries = ["one"] * 9 + [str(number) for number in range(11)]
    facts = choose_threshold(labels, scores, Aim("fixed", 0.5), queries).facts
    assert facts["false_positive_rate"] == pytest.approx(1 / 11)
    assert facts["f1"] == pytest.approx(2 / 11), "F1 is of the answers as they are"
