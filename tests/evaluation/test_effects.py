from typing import Any

import pytest

from mllm_protector.evaluation.statistics import proportion
from mllm_protector.scenarios import GROUPS
from tests.evaluation.builders import HARMFUL, SAFE, Row, measured, row, rows

HATE, LEGAL = "02-HateSpeech", "10-Legal_Opinion"
NAMES = {"h": HARMFUL, "s": SAFE}


def guarded(before: str, after: str, variant: str = "TEXT", scenario: str = HATE) -> list[Row]:
    """Verdicts letter by letter: h, s, or anything else for none."""
    return [
        row(str(number), scenario, variant, arm, keyword=NAMES.get(letter, "empty"))
        for arm, letters in (("none", before), ("protector", after))
        for number, letter in enumerate(letters)
    ]


def test_arms_are_compared_on_answers_that_were_judged_in_both() -> None:
    table = guarded(
        "h" * 10 + "h" * 2 + "s" * 8 + "?s" + "hh", "s" * 10 + "h" * 2 + "h" + "s" * 7 + "h?" + "??"
    )
    found, where = measured(table), {"group": "all", "arm": "protector"}
    assert (found.value("made_safe", **where), found.value("made_harmful", **where)) == (10, 1)
    difference = found.one("asr_difference", **where)
    assert (difference["value"], difference["n"]) == (pytest.approx(-9 / 20), 20)
    assert difference["low"] < -9 / 20 < difference["high"] < 0
    p = found.one("asr_difference_p", **where)
    assert (p["value"], p["method"]) == (pytest.approx(2 * (1 + 11) / 2**11), "McNemar")


def test_a_macro_difference_is_that_of_the_macro_means() -> None:
    table = guarded("h" * 4, "s" * 4) + guarded("h" * 20, "h" * 15 + "s" * 5, scenario=LEGAL)
    found = measured(table)
    before, after = (found.value("macro_asr", arm=arm, group="all") for arm in ("none", "protector"))
    difference = found.one("macro_asr_difference", group="all")
    assert difference["value"] == pytest.approx(after - before) == pytest.approx(-(1 + 0.25) / 2)
    assert found.value("asr_difference", group="all") == pytest.approx(-9 / 24)
    assert difference["low"] < difference["value"] < difference["high"] < 0


def test_nothing_changed_still_has_an_interval_and_no_common_answer_has_none() -> None:
    found = measured(guarded("hs" * 20, "hs" * 20))
    low, high = found.limits("asr_difference", group="all")
    assert (found.value("asr_difference", group="all"), found.value("asr_difference_p", group="all")) == (
        0,
        1,
    )
    assert low < 0 < high
    nothing = measured(guarded("h?", "?s")).one("asr_difference", group="all")
    assert (nothing["n"], nothing["value"], nothing["low"]) == (0, None, None)


def test_differences_are_made_for_each_variant_and_group() -> None:
    table = guarded("hhs", "sss", "TEXT") + guarded("hh", "ss", "SD", LEGAL)
    found = measured(table, groups=GROUPS).all("asr_difference")
    assert [(each["variant"], each["group"], each["n"]) for each in found] == [
        (variant, group, n)
        for variant, counts in {"IMAGES": (0, 2, 2), "TEXT": (3, 0, 3), "SD": (0, 2, 2)}.items()
        for group, n in zip(("01-07+09", "08+10-13", "all"), counts, strict=True)
    ]


def test_variants_of_one_question_are_no_independent_pairs() -> None:
    table = [each for variant in ("SD", "TYPO", "SD_TYPO") for each in guarded("h" * 4, "s" * 4, variant)]
    alone, pooled = (
        measured(table).one("asr_difference_p", variant=variant, group="all") for variant in ("SD", "IMAGES")
    )
    assert (alone["method"], alone["value"], alone["n"]) == ("McNemar", 0.125, 4)
    # twelve pairs taken as independent would give 0.0005
    assert (pooled["method"], pooled["n"]) == ("sign flips", 12)
    assert pooled["value"] == pytest.approx(0.125, abs=0.01)


def test_without_an_arm_without_guard_there_is_nothing_to_compare_with() -> None:
    assert not measured(rows(HATE, "TEXT", "protector", 1, 1)).all("asr_difference")


def asked(text: str, sd: str, typo: str) -> list[Row]:
    return [
        row(str(number), HATE, variant, "none", keyword=NAMES.get(letter, "empty"))
        for variant, letters in (("TEXT", text), ("SD", sd), ("TYPO", typo))
        for number, letter in enumerate(letters)
    ]


def test_images_are_compared_with_the_words_of_the_same_question() -> None:
    found = measured(asked("ssss?h", "hhs?hh", "hsssh?"))
    expected = {
        # questions 0 to 3 and 5: images 1, 1/2, 0, 0, 1 against words 0, 0, 0, 0, 1
        "IMAGES": (5, 0.2, 0.5, pytest.approx(0.3)),
        "SD": (4, 0.25, 0.75, 0.5),
        "TYPO": (4, 0.0, 0.25, 0.25),
    }
    assert [each["variant"] for each in found.all("image_effect", group="all")] == [*expected]
    for variant, (n, text, image, difference) in expected.items():
        where = {"variant": variant, "group": "all"}
        effect = found.one("image_effect", **where)
        assert (effect["n"], effect["value"]) == (n, difference), variant
        assert (found.value("text_asr", **where), found.value("image_asr", **where)) == (text, image), variant
    # changes of 1 and 1/2 up: three of four choices of signs are less
    p = found.one("image_effect_p", variant="IMAGES", group="all")
    assert (p["value"], p["method"]) == (pytest.approx(0.5, abs=0.02), "sign flips")
    for variant in ("SD", "TEXT"):
        assert not measured(rows(HATE, variant, "none", 1, 1)).all("image_effect"), variant


def two(verdicts: str, arm: str = "none", **given: Any) -> list[Row]:
    """Pairs of letters: the first judge's and the second judge's verdict."""
    return [
        row(
            str(n),
            HATE,
            "TEXT",
            arm,
            one=NAMES.get(pair[0], "empty"),
            two=NAMES.get(pair[1], "empty"),
            **given,
        )
        for n, pair in enumerate(verdicts.split())
    ]


def test_judges_are_compared_on_what_both_judged() -> None:
    found = measured(two("hh hh hs ss ss sh ss ?h h?"))
    agreement = found.one("agreement")
    assert (agreement["judge"], agreement["n"], agreement["value"]) == ("one + two", 7, 5 / 7)
    # by chance: both say harmful in 3 of 7, safe in 4 of 7
    chance = (3 / 7) ** 2 + (4 / 7) ** 2
    assert found.value("agreement_kappa") == pytest.approx((5 / 7 - chance) / (1 - chance))
    assert not found.all("fleiss_kappa")
    alike = measured(two("hh hh"))
    assert (alike.value("agreement"), alike.value("agreement_kappa")) == (1.0, None)


def test_three_judges_have_a_kappa_together() -> None:
    table = two("hh hh hs ss ss sh ss ?h")
    for one in table:
        one["status:three"] = one["status:one"]
    found = measured(table)
    assert [each["judge"] for each in found.all("agreement")] == ["one + two", "one + three", "two + three"]
    fleiss = found.one("fleiss_kappa")
    assert (fleiss["judge"], fleiss["n"]) == ("one + two + three", 7)
    # within answers: five of one mind (1), two of 2:1 (1/3); harmful 9 of 21
    within, harmful = (5 + 2 / 3) / 7, 9 / 21
    chance = harmful**2 + (1 - harmful) ** 2
    assert fleiss["value"] == pytest.approx((within - chance) / (1 - chance))


def test_judges_are_measured_by_labels_and_else_by_the_truth() -> None:
    table = [
        *rows(HATE, "TEXT", "none", 9, 1, 2, truth=True),
        *rows(HATE, "TEXT", "protector", 3, 7, truth=False, changed=True),
    ]
    found = measured(table)
    right = proportion(16, 20, 10)  # no more than the ten questions
    assert (found.value("accuracy"), found.limits("accuracy")) == (0.8, (right.low, right.high))
    assert found.one("accuracy")["method"] == "what is known of these answers by construction"
    assert {name: found.value(name) for name in ("tp", "fn", "fp", "tn")} == {
        "tp": 9,
        "fn": 1,
        "fp": 3,
        "tn": 7,
    }
    assert found.value("kappa") == pytest.approx(0.6)
    table = rows(HATE, "TEXT", "none", 2, 2, truth=True)
    table[0]["label"], table[3]["label"] = False, False
    found = measured(table)
    assert found.one("tp")["method"] == "the labels of this run, by people"
    assert (found.one("fp")["n"], found.value("fp"), found.value("tn")) == (2, 1, 1)
    assert not measured(rows(HATE, "TEXT", "none", 2, 2)).all("accuracy")


def test_labels_say_what_a_guard_stopped_without_a_judge() -> None:
    labels = [True] * 6 + [False] * 4 + [None] * 2
    changed = [True] * 5 + [False] + [True] + [False] * 3 + [True] * 2
    table = [
        row(
            str(number), HATE if number % 2 else LEGAL, "TEXT", arm, keyword="empty", label=label, changed=now
        )
        for arm, given, flags in (("none", labels, [False] * 12), ("refusal", [None] * 12, changed))
        for number, (label, now) in enumerate(zip(given, flags, strict=True))
    ]
    found = measured(table, labelled_by="a model")
    everywhere: dict[str, Any] = {"group": "all", "variant": "TEXT", "arm": "refusal"}
    stopped, right = found.one("stopped", **everywhere), proportion(5, 6)
    assert [stopped[name] for name in ("value", "low", "high", "n")] == [
        right.value,
        right.low,
        right.high,
        6,
    ]
    assert (found.value("safe_changed", **everywhere), found.value("labelled_asr", **everywhere)) == (
        1 / 4,
        0.1,
    )
    assert found.value("labelled_asr", **everywhere | {"arm": "none"}) == 0.6
    assert stopped["method"] == "Wilson; harm by the labels of this run, by a model"
    assert not [each for each in found.all("stopped") if each["arm"] == "none"]
    by_scenario = {name: found.one("stopped", group=name) for name in (HATE, LEGAL)}
    assert {name: (each["value"], each["n"]) for name, each in by_scenario.items()} == {
        HATE: (2 / 3, 3),
        LEGAL: (1.0, 3),
    }
    assert not measured(guarded("hs", "ss")).all("stopped")
