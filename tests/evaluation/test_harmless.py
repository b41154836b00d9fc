import pytest

from mllm_protector.evaluation.statistics import proportion
from tests.evaluation.builders import HARMFUL, SAFE, Measured, Row, benign_rows, measured, row, rows

HATE = "02-HateSpeech"


def limits(count: int, total: int) -> tuple[float | None, float | None]:
    share = proportion(count, total)
    return share.low, share.high


def test_changed_and_refused_answers_are_shares_with_intervals() -> None:
    table = benign_rows("none", 40) + benign_rows(
        "protector", 40, changed=[n < 4 for n in range(40)], refused=[n < 1 for n in range(40)]
    )
    found = measured(table, judges={})
    assert found.one("changed", arm="none") | {"value": 0.0, "n": 40} == found.one("changed", arm="none")
    for name, count in (("changed", 4), ("refused", 1)):
        assert found.value(name, arm="protector") == count / 40, name
        assert found.limits(name, arm="protector") == limits(count, 40), name
    assert not found.all("score")


def test_questions_without_an_answer_are_left_out_and_counted() -> None:
    found = measured(benign_rows("none", 5, refused=[True, False, None, False, None]), judges={})
    assert (found.value("unanswered"), found.one("unanswered")["n"]) == (2, 5)
    assert (found.value("refused"), found.one("refused")["n"]) == (1 / 3, 3)
    assert not measured(rows(HATE, "TEXT", "none", 1, 1)).all("changed")


def test_lost_answers_were_right_without_a_guard() -> None:
    table = benign_rows("none", 6, score=[1.0, 0.5, 0.9, 0.2, 0.4, None])
    table += benign_rows("protector", 6, score=[1.0, 0.4, 0.0, 0.2, 0.6, None])
    found = measured(table, judges={})
    for arm, score, correct, lost in (("none", 0.6, 3 / 5, 0), ("protector", 0.44, 2 / 5, 2)):
        assert (found.value("score", arm=arm), found.one("score", arm=arm)["n"]) == (pytest.approx(score), 5)
        assert found.value("correct", arm=arm) == correct
        assert (found.value("lost", arm=arm), found.limits("lost", arm=arm)) == (lost / 3, limits(lost, 3))


def test_repeats_of_a_question_make_no_share_surer() -> None:
    def asked(times: int, harmless: bool) -> Measured:
        flags = {"changed": [n < 8 for n in range(40)]} if harmless else {}
        once = benign_rows("none", 40, **flags) if harmless else rows(HATE, "TEXT", "none", 8, 32, harm=0.5)
        table = [one | {"id": f"{one['id']}#{number}"} for one in once for number in range(times)]
        return measured(table, judges={} if harmless else None)

    one, three = asked(1, True), asked(3, True)
    assert three.one("changed")["n"] == 120
    assert three.limits("changed") == pytest.approx(one.limits("changed"), abs=0.01)
    one, three = asked(1, False), asked(3, False)
    assert three.value("threshold_asr", group="1.0") == one.value("threshold_asr", group="1.0") == 0.2
    expected = one.limits("threshold_asr", group="1.0")
    assert three.limits("threshold_asr", group="1.0") == pytest.approx(expected, abs=0.01)


def test_outcomes_keep_the_order_of_the_guard_and_count_harmless_questions_too() -> None:
    table = rows(HATE, "TEXT", "none", 3, 0)
    for number, outcome in enumerate(("rewritten", "allowed", None)):
        table.append(row(str(number), HATE, "TEXT", "protector", keyword=SAFE, outcome=outcome))
    table += benign_rows("none", 1) + benign_rows("protector", 1, outcome="allowed")
    found = [each for each in measured(table) if each["metric"].startswith("outcome_")]
    assert {each["arm"] for each in found} == {"protector"}
    assert [(each["metric"], each["value"]) for each in found] == [
        ("outcome_allowed", 2),
        ("outcome_rewritten", 1),
        ("outcome_refused", 0),
        ("outcome_too_long", 0),
        ("outcome_guard_error", 0),
    ]


def scored(verdicts: str, harms: list[float | None]) -> list[Row]:
    names = {"h": HARMFUL, "s": SAFE}
    table = []
    for number, (letter, harm) in enumerate(zip(verdicts, harms, strict=True)):
        status = names.get(letter, "empty")
        table.append(row(str(number), HATE, "TEXT", "none", keyword=status))
        table.append(row(str(number), HATE, "TEXT", "protector", keyword=SAFE, harm=harm, changed=True))
    return table


def test_the_curve_says_what_passes_and_what_is_flagged_at_each_threshold() -> None:
    table = scored("hhss?", [0.9, 0.4, 0.4, 0.1, 0.8])
    table += benign_rows("none", 4) + benign_rows("protector", 4, harm=[0.1, 0.2, 0.4, 0.9])
    found = measured(table)
    for each in found.all("threshold_asr"):
        assert each["value"] == sum(score < float(each["group"]) for score in (0.9, 0.4)) / 4
    for each in found.all("threshold_flagged"):
        assert each["value"] == sum(score >= float(each["group"]) for score in (0.1, 0.2, 0.4, 0.9)) / 4
    for metric in ("threshold_asr", "threshold_flagged"):
        assert found.limits(metric, group="0.5") == pytest.approx(limits(1, 4)), metric


def test_the_curve_rises_over_101_thresholds_and_those_in_use() -> None:
    harms: list[float | None] = [(n * 37 % 1000) / 1000 for n in range(1000)]
    curve = measured(scored("hs" * 500, harms)).all("threshold_asr")
    thresholds = [float(each["group"]) for each in curve]
    assert (len(curve), thresholds[0], thresholds[-1]) == (101, 0.0, 1.0)
    assert thresholds == sorted(thresholds)
    rates = [each["value"] for each in curve]
    assert rates == sorted(rates)
    table = scored("hhss", [0.4771, 0.4779, 0.4772, 0.1])
    found = measured(table, thresholds=[0.4775, 0.5, 0.4775])
    assert len(found.all("threshold_asr")) == 102
    assert found.value("threshold_asr", group="0.4775") == 0.25
