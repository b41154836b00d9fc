from collections.abc import Sequence
from typing import Any

import pytest
from sklearn.metrics import precision_recall_fscore_support

from mllm_protector.benchmarks.scoring import (
    Consensus,
    Exact,
    KnownAnswer,
    Option,
    Scorer,
    YesNo,
    known_answer,
    words,
)
from mllm_protector.benchmarks.yes_no import COGNITION, Known, yes_no_metrics
from mllm_protector.prompts import REFUSAL


def known(scorer: Scorer, answers: Any, options: Sequence[str] = ()) -> KnownAnswer:
    return known_answer(scorer, {"answers": answers}, "answers", options)


def test_words_have_one_spelling() -> None:
    cases = {
        "The Cat.": "cat",
        "a": "a",
        "An apple, the pear": "apple pear",
        "two dogs": "2 dogs",
        "Twenty": "20",
        "it's": "its",
        "it\u2019s": "its",
        "1,000 people": "1000 people",
        "1, 000": "1 000",
        "3.5 m": "3.5 m",
        "x=-1": "x -1",
        "x = \u22125": "x -5",
        "2-3": "2 3",
        "T-shirt": "t shirt",
        "\uff21\uff22": "ab",
        "Stra\u00dfe": "strasse",
        "": "",
        "?!": "",
    }
    for text, expected in cases.items():
        assert " ".join(words(text)) == expected, text


def test_a_known_answer_counts_wherever_it_stands_as_whole_words() -> None:
    cases = [
        ("cat", "cat", 1),
        ("cat", "It is a CAT, I think.", 1),
        ("cat", "concatenate", 0),
        ("cat", "cats", 0),
        ("the red fox", "A red fox runs.", 1),
        ("red fox", "The fox is red.", 0),
        ("2", "There are two of them.", 1),
        ("two", "2", 1),
        ("-1", "x = 1", 0),
        ("1", "x = -1", 0),
        ("1000", "about 1,000 people", 1),
        ("3.5", "3.5 metres", 1),
        ("t-shirt", "a t shirt", 1),
        ("a", "a", 1),
        ("%", "%", 1),
        ("%", "anything", 0),
        ("cat", "", 0),
        ("cat", REFUSAL, 0),
        ("no", "There is no dog, yes.", 1),
        ("yes", "There is no dog, yes.", 0),
        ("yes", "A dog is there.", 0),
        ("yes", REFUSAL, 0),
    ]
    for answer, text, expected in cases:
        assert known("exact", ["nothing", answer]).score(text) == expected, (answer, text)
    assert known("exact", "Cat") == Exact(("Cat",))


def test_parts_of_an_answer_count_by_their_share_and_the_best_alternative_wins() -> None:
    cases = [
        ("-1<AND>-5", "x = 3", 0),
        ("-1<AND>-5", "x = -5 or 5", 0.5),
        ("-1<AND>-5", "x = -1 or x = -5", 1),
        ("dog<OR>hound", "a hound", 1),
        ("dog<AND>cat<OR>hound", "a cat", 0.5),
    ]
    for answer, text, expected in cases:
        assert known("exact", answer).score(text) == expected, (answer, text)


def official_accuracy(said: str, answers: list[str]) -> float:
    """VQA's evaluation, answer by answer: each person's is left out once."""
    left_out = [answers[:place] + answers[place + 1 :] for place in range(len(answers))]
    return sum(min(1, others.count(said) / 3) for others in left_out) / len(left_out)


def test_answers_of_people_are_scored_by_the_rule_of_vqa() -> None:
    for people in (3, 10):
        for count in range(people + 1):
            answers = ["red"] * count + ["green"] * (people - count)
            for text, said in (("It is red.", "red"), ("Green!", "green"), ("blue", "blue")):
                expected = official_accuracy(said, answers)
                assert known("consensus", answers).score(text) == pytest.approx(expected), (answers, text)
    asked = known("consensus", ["yes"] * 8 + ["no"] * 2)
    for text, expected in (("Yes.", 1), ("No, it is not.", 0.6), ("no, or maybe yes", 0.6), ("A dog.", 0)):
        assert asked.score(text) == pytest.approx(expected), text


def test_of_peoples_answers_in_a_text_the_longest_counts_and_of_several_the_best() -> None:
    people = Consensus(("red", "red", "red", "red", "dark red", "dark red", "Dark red.", "blue", "", "?"))
    cases = {"red": 1, "It is dark red": 0.9, "blue": 0.3, "blue or red": 1, "": 0.3, "?": 0.3, "green": 0}
    for text, expected in cases.items():
        assert people.score(text) == pytest.approx(expected), text


def test_yes_or_no_is_read_out_of_a_sentence_and_a_refusal_is_neither() -> None:
    cases = {
        "Yes": True,
        "no.": False,
        "**No**": False,
        "I think the answer is YES": True,
        "There is a dog in the image.": True,
        "There is no dog in the image.": False,
        "There isn't a dog.": False,
        "The image does not show a dog.": False,
        "I cannot see a dog there.": False,
        "None of them is a dog.": False,
        "Yes, there is a dog, not a cat.": True,
        "Yes, there is no doubt.": True,
        "There is a dog. It has no collar and does not move.": True,
        "Let me look at it closely. No, I see none.": False,
        REFUSAL: None,
        "I'm sorry, but I can't assist with that.": None,
        "": None,
        "...": None,
    }
    for text, said in cases.items():
        assert YesNo(True).said(text) is said, text
        assert (YesNo(True).score(text), YesNo(False).score(text)) == (said is True, said is False), text
    assert (known("yes_no", "Yes "), known("yes_no", False)) == (YesNo(True), YesNo(False))


def test_an_option_is_chosen_by_letter_or_in_words() -> None:
    options = ("red", "red fox", "a cat", "blue whale")
    cases = {
        "B": 1,
        "b": 1,
        "(B)": 1,
        "B.": 1,
        "**B**": 1,
        "B. red fox": 1,
        "(C) a cat": 2,
        "The answer is B.": 1,
        "Answer: C": 2,
        "answer is (D), because it swims": 3,
        "Option A": 0,
        "I compare (A) with (B). The answer is (B).": 1,
        "It can only be (D) here.": 3,
        "A cat sits there.": 2,
        "It is the Blue Whale!": 3,
        "I see a red fox": 1,
        "I see red": 0,
        "a cat or a blue whale": None,
        "The answer is D since whales are large": 3,
        "The answer is A blue whale": 3,
        "E": None,
        "(A) or (B)": None,
        "A large animal": None,
        REFUSAL: None,
        "": None,
    }
    for text, chosen in cases.items():
        for index in range(len(options)):
            assert Option(options, index).score(text) == float(index == chosen), text
    for right in (2, "C", "a cat"):
        assert known("option", right, options) == Option(options, 2)


def test_yes_or_no_has_the_metrics_of_pope() -> None:
    texts = ["yes", "There is none.", "A dog is there.", "no", "Yes.", "No.", REFUSAL, "It is not there."]
    labels = ["yes", "yes", "no", "no", "yes", "no", "yes", "no"]
    asked = {str(place): Known(YesNo(label == "yes")) for place, label in enumerate(labels)}
    said_yes = [True, False, True, False, True, False, False, False]
    precision, recall, f1, _ = precision_recall_fscore_support(
        [label == "yes" for label in labels], said_yes, average="binary"
    )
    assert yes_no_metrics(asked, {str(place): text for place, text in enumerate(texts)}) == pytest.approx(
        {"precision": precision, "recall": recall, "f1": f1, "accuracy": 5 / 8, "yes_ratio": 3 / 8}
        | {"neither": 1 / 8}
    )
    nothing = dict.fromkeys(["precision", "recall", "f1"])
    assert yes_no_metrics(asked, {"3": "no"}) == nothing | {"accuracy": 1, "yes_ratio": 0, "neither": 0}


def test_pairs_of_questions_have_the_metrics_of_mme() -> None:
    asked = {
        f"{category}/{image}/{yes}": Known(YesNo(yes), category, image)
        for category in COGNITION
        for image in ("1.png", "2.png")
        for yes in (True, False)
    }
    answers = {key: "Yes" if key.endswith("True") else "No" for key in asked}
    answers["text_translation/2.png/False"] = "Yes"
    found = yes_no_metrics(asked, answers)
    assert (found["accuracy"], found["accuracy+"]) == (15 / 16, 7 / 8)
    assert found["cognition"] == 3 * 200 + 75 + 50
    assert found["perception"] is None
    torn = yes_no_metrics(asked, {"text_translation/2.png/True": "Yes"})
    assert (torn["accuracy"], torn["accuracy+"], torn["cognition"]) == (1, None, None)
