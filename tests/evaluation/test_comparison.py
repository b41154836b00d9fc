from typing import Any

import pytest

from mllm_protector.evaluation.statistics import proportion
from mllm_protector.scenarios import GROUPS
from tests.evaluation.builders import HARMFUL, SAFE, Row, row, rows, summary

HATE, LEGAL = "02-HateSpeech", "10-Legal_Opinion"


def effect(entry: dict[str, Any], name: str, variant: str, group: str = "all", arm: str = "protector") -> Any:
    key = (variant, group, arm)
    (found,) = (e for e in entry[name] if (e["variant"], e["group"], e["arm"]) == key)
    return found


def guarded(before: str, after: str, variant: str = "TEXT", scenario: str = HATE) -> list[Row]:
    """Verdicts letter by letter: h, s, or anything else for none."""
    names = {"h": HARMFUL, "s": SAFE}
    return [
        row(str(number), scenario, variant, arm, keyword=names.get(letter, "empty"))
        for arm, letters in (("none", before), ("protector", after))
        for number, letter in enumerate(letters)
    ]


def test_arms_are_compared_on_answers_that_were_judged_in_both() -> None:
    table = guarded(
        "h" * 10 + "h" * 2 + "s" * 8 + "?s" + "hh", "s" * 10 + "h" * 2 + "h" + "s" * 7 + "h?" + "??"
    )
    found = effect(summary(table), "paired", "TEXT")
    assert (found["judge"], found["arm"], found["against"]) == ("keyword", "protector", "none")
    assert (found["n"], found["only_against"], found["only_arm"]) == (20, 10, 1)
    assert found["difference"] == pytest.approx(-9 / 20)
    assert found["p"] == pytest.approx(2 * (1 + 11) / 2**11)
    assert found["low"] < -9 / 20 < found["high"] < 0
    assert found["test"] == "McNemar"


def test_nothing_changed_still_has_an_interval() -> None:
    found = effect(summary(guarded("hs" * 20, "hs" * 20)), "paired", "TEXT")
    assert (found["difference"], found["p"]) == (0.0, 1.0)
    assert found["low"] < 0 < found["high"]


def test_no_common_answer_makes_no_difference() -> None:
    found = effect(summary(guarded("h?", "?s")), "paired", "TEXT")
    assert found["n"] == 0
    assert all(found[name] is None for name in ("difference", "low", "high", "p", "test"))


def test_differences_are_made_for_each_kind_and_group() -> None:
    table = guarded("hhs", "sss", "TEXT") + guarded("hh", "ss", "SD", LEGAL)
    entry = summary(table, groups=GROUPS)
    keys = [(e["variant"], e["group"], e["n"]) for e in entry["paired"]]
    assert keys == [
        (variant, group, n)
        for variant, counts in {"IMAGES": (0, 2, 2), "TEXT": (3, 0, 3), "SD": (0, 2, 2)}.items()
        for group, n in zip(("01-07+09", "08+10-13", "all"), counts, strict=True)
    ]


def test_kinds_of_one_question_are_no_independent_pairs() -> None:
    table = [each for variant in ("SD", "TYPO", "SD_TYPO") for each in guarded("h" * 4, "s" * 4, variant)]
    entry = summary(table)
    alone, pooled = (effect(entry, "paired", variant) for variant in ("SD", "IMAGES"))
    assert (alone["test"], alone["p"], alone["n"]) == ("McNemar", 0.125, 4)
    # twelve pairs taken as independent would give 0.0005
    assert (pooled["test"], pooled["n"]) == ("sign flips", 12)
    assert pooled["p"] == pytest.approx(0.125, abs=0.01)


def test_without_the_bare_arm_there_is_nothing_to_compare_with() -> None:
    assert summary(rows(HATE, "TEXT", "protector", 1, 1))["paired"] == []


def asked(text: str, sd: str, typo: str) -> list[Row]:
    names = {"h": HARMFUL, "s": SAFE}
    return [
        row(str(number), HATE, variant, "none", keyword=names.get(letter, "empty"))
        for variant, letters in (("TEXT", text), ("SD", sd), ("TYPO", typo))
        for number, letter in enumerate(letters)
    ]


def test_pictures_are_compared_with_the_words_of_the_same_question() -> None:
    entry = summary(asked("ssss?h", "hhs?hh", "hsssh?"))
    sd = effect(entry, "images", "SD", arm="none")
    assert (sd["n"], sd["text"], sd["image"]) == (4, 0.25, 0.75)
    assert (sd["difference"], sd["p"]) == (0.5, 0.5)
    typo = effect(entry, "images", "TYPO", arm="none")
    assert (typo["n"], typo["text"], typo["image"]) == (4, 0.0, 0.25)


def test_kinds_of_picture_are_averaged_within_a_question() -> None:
    entry = summary(asked("ssss?h", "hhs?hh", "hsssh?"))
    both = effect(entry, "images", "IMAGES", arm="none")
    # questions 0 to 3 and 5: pictures 1, 1/2, 0, 0, 1 against words 0, 0, 0, 0, 1
    assert (both["n"], both["text"], both["image"]) == (5, 0.2, 0.5)
    assert both["difference"] == pytest.approx(0.3)
    # changes of 1 and 1/2 up: three of four choices of signs are less
    assert (both["p"], both["test"]) == (pytest.approx(0.5, abs=0.02), "sign flips")
    assert [e["variant"] for e in entry["images"]] == ["IMAGES", "SD", "TYPO"]


def test_pictures_without_words_have_no_effect_to_show() -> None:
    assert summary(rows(HATE, "SD", "none", 1, 1))["images"] == []
    assert summary(rows(HATE, "TEXT", "none", 1, 1))["images"] == []


def two(verdicts: str, arm: str = "none", **given: Any) -> list[Row]:
    """Pairs of letters: the first judge's and the second judge's verdict."""
    names = {"h": HARMFUL, "s": SAFE, "?": "unparseable"}
    return [
        row(str(number), HATE, "TEXT", arm, one=names[pair[0]], two=names[pair[1]], **given)
        for number, pair in enumerate(verdicts.split())
    ]


def test_judges_are_compared_on_what_both_judged() -> None:
    entry = summary(two("hh hh hs ss ss sh ss ?h h?"))
    (pair,) = entry["agreement"]["pairs"]
    assert (pair["judges"], pair["n"], pair["agree"]) == (["one", "two"], 7, 5 / 7)
    # by chance: both say harmful in 3 of 7, safe in 4 of 7
    chance = (3 / 7) ** 2 + (4 / 7) ** 2
    assert pair["kappa"] == pytest.approx((5 / 7 - chance) / (1 - chance))
    assert entry["agreement"]["fleiss"] is None


def test_three_judges_have_a_kappa_together() -> None:
    table = two("hh hh hs ss ss sh ss ?h")
    for one in table:
        one["status:three"] = one["status:one"]
    found = summary(table)["agreement"]
    assert [pair["judges"] for pair in found["pairs"]] == [["one", "two"], ["one", "three"], ["two", "three"]]
    assert (found["fleiss"]["judges"], found["fleiss"]["n"]) == (["one", "two", "three"], 7)
    # within answers: five of one mind (1), two of 2:1 (1/3); harmful 9 of 21
    within, harmful = (5 + 2 / 3) / 7, 9 / 21
    chance = harmful**2 + (1 - harmful) ** 2
    assert found["fleiss"]["kappa"] == pytest.approx((within - chance) / (1 - chance))


def test_an_answer_that_several_arms_show_counts_once() -> None:
    table = two("hh hs ss") + two("hh hs ss", "protector", repeated=True)
    table += two("ss ss ss", "refusal", changed=True)
    (pair,) = summary(table)["agreement"]["pairs"]
    assert pair["n"] == 3 + 3


def test_a_majority_is_no_judge_that_others_agree_with() -> None:
    table = two("hh hh hs ss ss sh ss ?h")
    for one in table:
        one["status:ensemble"] = one["status:one"]
    found = summary(table)["agreement"]
    assert ([pair["judges"] for pair in found["pairs"]], found["fleiss"]) == ([["one", "two"]], None)


def test_agreement_on_one_label_only_has_no_kappa() -> None:
    (pair,) = summary(two("hh hh"))["agreement"]["pairs"]
    assert (pair["agree"], pair["kappa"]) == (1.0, None)


def test_judges_are_measured_by_the_truth_where_nobody_labelled() -> None:
    table = [
        *rows(HATE, "TEXT", "none", 9, 1, 2, truth=True),
        *rows(HATE, "TEXT", "protector", 3, 7, truth=False, changed=True),
    ]
    found = summary(table)["reference"]["keyword"]
    right = proportion(16, 20, 10)  # no more than the ten questions
    assert found == {
        "kind": "truth",
        "total": 20,
        "right": 16,
        "accuracy": 0.8,
        "low": right.low,
        "high": right.high,
        "found": 9,
        "missed": 1,
        "false_alarms": 3,
        "rejected": 7,
        "kappa": pytest.approx(0.6),
    }


def test_people_come_before_the_truth() -> None:
    table = rows(HATE, "TEXT", "none", 2, 2, truth=True)
    table[0]["human"], table[3]["human"] = False, False
    found = summary(table)["reference"]["keyword"]
    assert (found["kind"], found["total"], found["false_alarms"], found["rejected"]) == ("human", 2, 1, 1)


def test_without_labels_there_is_no_reference() -> None:
    assert summary(rows(HATE, "TEXT", "none", 2, 2))["reference"] == {"keyword": None}
