"""Which known errors correct a judge, and which answers count once."""

from tests.evaluation.builders import measured, rows

HATE = "02-HateSpeech"


def test_a_rate_is_corrected_by_errors_on_the_answers_that_it_is_of() -> None:
    # As text the judge calls 40 of 80 safe answers harmful; with an image, and of a guard's refusals, none.
    table = [
        *rows(HATE, "TEXT", "none", 80, 40),
        *rows(HATE, "SD", "none", 40, 80),
        *rows(HATE, "SD", "protector", 0, 120, truth=False, changed=True),
        *rows(HATE, "TEXT", "protector", 60, 60, changed=True),
    ]
    for one in table:
        if one["arm"] == "none":
            one["truth"] = one["status:keyword"] == "harmful" and int(one["base"].split("/")[1]) < 40
    found = measured(table, arms=["none", "protector"])
    # Of the guard's answers with an image none is harmful, so those without a guard count as well.
    for arm in ("none", "protector"):
        for variant, specificity in (("TEXT", "0.500"), ("SD", "1.000")):
            method = found.one("corrected_asr", arm=arm, variant=variant, group="all")["method"]
            assert f"specificity {specificity}" in method, (arm, variant, method)


def test_a_majority_is_no_judge_that_others_agree_with() -> None:
    table = rows(HATE, "TEXT", "none", 5, 5, judges=("one", "two", "ensemble"))
    found = measured(table)
    assert [each["judge"] for each in found.all("agreement")] == ["one + two"]
    assert not found.all("fleiss_kappa")


def test_an_answer_that_several_arms_show_counts_once() -> None:
    table = rows(HATE, "TEXT", "none", 2, 1, judges=("one", "two"))
    table += rows(HATE, "TEXT", "protector", 2, 1, judges=("one", "two"), repeated=True)
    table += rows(HATE, "TEXT", "refusal", 0, 3, judges=("one", "two"), changed=True)
    assert measured(table).one("agreement")["n"] == 3 + 3
