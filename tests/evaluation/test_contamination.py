from collections.abc import Sequence
from typing import Any

import pytest

from mllm_protector.data.duplicates import check_contamination
from mllm_protector.evaluation.items import contamination_notes, seen_in_training
from mllm_protector.records import Question
from mllm_protector.reporting.sentences import training_lines

WORDS = "amber birch cedar dune ember fjord grove heath islet knoll"
"""No question of one letter's words stands in another's."""

TEXTS = [f"what is the {word} of {word} hill and who made it then" for word in WORDS.split()]


def asked(texts: Sequence[str] = TEXTS) -> list[Question]:
    return [
        Question(id=str(place), scenario=f"scenario {place % 2}", variant="TEXT", text=text)
        for place, text in enumerate(texts)
    ]


def trained(
    learnt: Sequence[str], checked: Sequence[str] = TEXTS, name: str = "bench", removed: bool = False
) -> dict[str, Any]:
    """What a training on these texts writes into its guard file."""
    found = check_contamination(learnt, {name: checked}).as_json()
    facts = {key: value for key, value in found[name].items() if key != "examples"}
    return {"account": "", "contamination": {name: facts | {"removed": removed}}}


def seen(data: dict[str, Any], questions: Sequence[Question] = tuple(asked())) -> Any:
    return seen_in_training(questions, "bench", {"detector": data})["detector"]


@pytest.mark.parametrize(
    "data", [{}, {"contamination": None}, {"contamination": {}}, trained(TEXTS, TEXTS[:3], "another")]
)
def test_nothing_is_known_where_nobody_looked_for_this_benchmark(data: dict[str, Any]) -> None:
    assert seen(data) is None


def test_questions_that_were_found_are_counted_by_scenario() -> None:
    found = seen(trained([TEXTS[0].upper(), f"Well. {TEXTS[0]}?", TEXTS[3], TEXTS[5], "a talk"]))
    assert found == {
        "same_questions": True,
        "asked": 10,
        "found": 3,
        "scenarios": {"scenario 0": 1, "scenario 1": 2},
        "rows": 4,
        "removed": False,
        "threshold": found["threshold"],
    }


def test_a_text_that_holds_two_questions_is_one_text() -> None:
    assert seen(trained([f"{TEXTS[0]}; {TEXTS[1]}"]))["rows"] == 1


def test_questions_asked_in_several_ways_and_again_count_once() -> None:
    found = seen(trained(TEXTS[:2]), asked([*TEXTS, *TEXTS, TEXTS[0].upper()]))
    assert (found["same_questions"], found["asked"], found["found"]) == (True, 10, 2)


def test_only_questions_that_are_asked_count_and_another_selection_is_told() -> None:
    found = seen(trained([TEXTS[0], TEXTS[8]]), asked(TEXTS[:4]))
    assert (found["same_questions"], found["asked"], found["found"], found["rows"]) == (False, 4, 1, 1)


def test_the_same_questions_are_known_under_another_name() -> None:
    assert seen(trained(TEXTS[:1], name="its folder"))["found"] == 1


def lines(**parts: Any) -> list[str]:
    return training_lines({"contamination": seen_in_training(asked(), "bench", parts)}, "bench")


def test_parts_that_were_not_checked_are_said_in_one_line_with_what_to_do() -> None:
    assert lines(detector={}, detoxifier={}) == [
        "Not checked: whether these questions stand in the training data of the detector and the"
        " detoxifier; train with benchmark=[bench] to know."
    ]
    assert lines() == []


def test_clean_training_data_is_said() -> None:
    data = trained(["a talk"])
    assert lines(detector=data, detoxifier=data) == [
        "Checked: none of the 10 different questions stands in the training data of the detector and the"
        " detoxifier."
    ]
    assert contamination_notes("bench", seen_in_training(asked(), "bench", {"detector": data})) == []


def test_another_selection_is_not_called_clean() -> None:
    assert lines(detector=trained(["a talk"], TEXTS[:4])) == [
        "Checked for another selection of questions: none of the 10 different questions is among those found"
        " in the training data of the detector."
    ]
    (line,) = lines(detector=trained(TEXTS[:1], TEXTS[:4]))
    assert line.endswith(" Another selection was checked, so there may be more.")


def test_each_part_says_what_was_found_and_whether_it_learnt_from_it() -> None:
    assert lines(detector=trained(TEXTS[:1]), detoxifier=trained(TEXTS[:3], removed=True)) == [
        "Checked: the training data of the detector holds, nearly word for word, 1 of the 10 different"
        " questions (scenario 0: 1); texts that hold them: 1, learnt from.",
        "Checked: the training data of the detoxifier holds, nearly word for word, 3 of the 10 different"
        " questions (scenario 0: 2, scenario 1: 1); texts that hold them: 3, removed before the training.",
    ]


def test_only_what_was_learnt_from_is_a_warning() -> None:
    parts = {"detector": trained(TEXTS[:1]), "detoxifier": trained(TEXTS[:3], removed=True)}
    (note,) = contamination_notes("bench", seen_in_training(asked(), "bench", parts))
    assert note.startswith("Contaminated: questions of bench ")
    assert "detector (1 of 10 different questions)" in note
    assert "detoxifier" not in note
