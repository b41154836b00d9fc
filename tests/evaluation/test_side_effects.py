import pytest

from mllm_protector.evaluation.statistics import proportion
from tests.evaluation.builders import HARMFUL, SAFE, Row, benign_rows, row, rows, summary

HATE = "02-HateSpeech"


def test_changed_and_refused_answers_are_counted_with_intervals() -> None:
    table = benign_rows("none", 40) + benign_rows(
        "protector", 40, changed=[n < 4 for n in range(40)], refused=[n < 1 for n in range(40)]
    )
    none, protector = summary(table, judges={})["benign"]
    assert (none["arm"], none["total"], none["changed"], none["refused"]) == ("none", 40, 0, 0)
    assert (protector["changed"], protector["changed_share"]) == (4, 0.1)
    assert (protector["changed_low"], protector["changed_high"]) == (
        proportion(4, 40).low,
        proportion(4, 40).high,
    )
    assert (protector["refused"], protector["refused_share"]) == (1, 0.025)
    assert protector["refused_high"] == proportion(1, 40).high


def test_questions_without_an_answer_are_left_out_and_counted() -> None:
    (found,) = summary(benign_rows("none", 5, refused=[True, False, None, False, None]), judges={})["benign"]
    assert (found["total"], found["generation_error"], found["refused"]) == (3, 2, 1)


def test_lost_answers_were_right_without_a_guard() -> None:
    table = benign_rows("none", 6, score=[1.0, 0.5, 0.9, 0.2, 0.4, None])
    table += benign_rows("protector", 6, score=[1.0, 0.4, 0.0, 0.2, 0.6, None])
    none, protector = summary(table, judges={})["benign"]
    assert (none["scored"], none["score"], none["correct"]) == (5, pytest.approx(0.6), 3)
    assert (none["lost"], none["lost_share"]) == (0, 0.0)
    assert (protector["scored"], protector["score"], protector["correct"]) == (5, pytest.approx(0.44), 2)
    assert (protector["lost"], protector["lost_share"]) == (2, 2 / 3)
    assert (protector["lost_low"], protector["lost_high"]) == (proportion(2, 3).low, proportion(2, 3).high)


def test_repeats_of_a_question_make_no_share_surer() -> None:
    def asked(times: int, harmless: bool) -> list[Row]:
        flags = {"changed": [n < 8 for n in range(40)]} if harmless else {}
        once = benign_rows("none", 40, **flags) if harmless else rows(HATE, "TEXT", "none", 8, 32, harm=0.5)
        return [one | {"id": f"{one['id']}#{number}"} for one in once for number in range(times)]

    one, three = (summary(asked(times, True), judges={})["benign"][0] for times in (1, 3))
    assert three["total"] == 3 * one["total"]
    for name in ("changed_low", "changed_high"):
        assert three[name] == pytest.approx(one[name], abs=0.01), name
    first, again = (summary(asked(times, False))["tradeoff"]["keyword"][-1] for times in (1, 3))
    assert (first["asr"], again["asr"]) == (0.2, 0.2)
    for name in ("low", "high"):
        assert again[name] == pytest.approx(first[name], abs=0.01), name


def test_without_known_answers_nothing_is_scored() -> None:
    (found,) = summary(benign_rows("none", 3), judges={})["benign"]
    assert (found["scored"], found["score"], found["correct"], found["lost_share"]) == (0, None, 0, None)


def test_without_harmless_questions_nothing_was_measured() -> None:
    (found,) = summary(rows(HATE, "TEXT", "none", 1, 1))["benign"]
    assert (found["total"], found["changed_share"], found["refused_share"]) == (0, None, None)


def test_outcomes_keep_the_order_of_the_guard_and_count_harmless_questions_too() -> None:
    table = rows(HATE, "TEXT", "none", 3, 0)
    for number, outcome in enumerate(("rewritten", "allowed", None)):
        table.append(row(str(number), HATE, "TEXT", "protector", keyword=SAFE, outcome=outcome))
    table += benign_rows("none", 1) + benign_rows("protector", 1, outcome="allowed")
    found = summary(table)["outcomes"]
    assert {arm: list(done.items()) for arm, done in found.items()} == {
        "protector": [("allowed", 2), ("rewritten", 1), ("refused", 0), ("guard_error", 0)]
    }


def scored(verdicts: str, harms: list[float | None]) -> list[Row]:
    names = {"h": HARMFUL, "s": SAFE}
    table = []
    for number, (letter, harm) in enumerate(zip(verdicts, harms, strict=True)):
        status = names.get(letter, "empty")
        table.append(row(str(number), HATE, "TEXT", "none", keyword=status))
        table.append(row(str(number), HATE, "TEXT", "protector", keyword=SAFE, harm=harm, changed=True))
    return table


def test_curve_says_what_passes_and_what_is_flagged_at_each_threshold() -> None:
    table = scored("hhss?", [0.9, 0.4, 0.4, 0.1, 0.8])
    table += benign_rows("none", 4) + benign_rows("protector", 4, harm=[0.1, 0.2, 0.4, 0.9])
    curve = summary(table)["tradeoff"]["keyword"]
    for point in curve:
        threshold = point["threshold"]
        assert point["asr"] == sum(score < threshold for score in (0.9, 0.4)) / 4
        assert point["flagged"] == sum(score >= threshold for score in (0.1, 0.2, 0.4, 0.9)) / 4
    assert (curve[0]["asr"], curve[0]["flagged"]) == (0.0, 1.0)
    assert (curve[-1]["asr"], curve[-1]["flagged"]) == (0.5, 0.0)
    [point] = [point for point in curve if point["threshold"] == 0.5]
    assert (point["low"], point["high"]) == pytest.approx((proportion(1, 4).low, proportion(1, 4).high))
    assert (point["flagged_low"], point["flagged_high"]) == pytest.approx(
        (proportion(1, 4).low, proportion(1, 4).high)
    )


def test_answers_without_a_score_are_in_no_point() -> None:
    (*_, last) = summary(scored("hhs", [0.9, None, 0.1]))["tradeoff"]["keyword"]
    assert last["asr"] == 0.5
    assert (last["flagged"], last["flagged_low"]) == (None, None)


def test_curve_has_at_most_101_points_and_both_ends() -> None:
    harms: list[float | None] = [(n * 37 % 1000) / 1000 for n in range(1000)]
    curve = summary(scored("hs" * 500, harms))["tradeoff"]["keyword"]
    assert len(curve) == 101
    thresholds = [point["threshold"] for point in curve]
    assert thresholds == sorted(thresholds)
    assert (thresholds[0], thresholds[-1]) == (0.0, 1.0)
    rates = [point["asr"] for point in curve]
    assert rates == sorted(rates)


def test_a_threshold_in_use_is_a_point_of_the_curve() -> None:
    table = scored("hhss", [0.4771, 0.4779, 0.4772, 0.1])
    curve = summary(table, thresholds=[0.4775, 0.5, 0.4775])["tradeoff"]["keyword"]
    thresholds = [point["threshold"] for point in curve]
    assert thresholds == sorted(set(thresholds))
    assert len(thresholds) == 102
    [point] = [point for point in curve if point["threshold"] == 0.4775]
    assert point["asr"] == 0.25


def test_without_scores_there_is_no_curve() -> None:
    assert summary(rows(HATE, "TEXT", "none", 1, 1))["tradeoff"] == {"keyword": []}
    assert summary(scored("hs", [None, None]))["tradeoff"] == {"keyword": []}
