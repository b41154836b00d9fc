import pytest

from mllm_protector.benchmarks.vqa_scoring import (
    Choice,
    Elements,
    PeoplesAnswers,
    Presence,
    ShortAnswer,
    YesNo,
    known_answer,
    stands_in,
    words,
)
from mllm_protector.prompts import REFUSAL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("a", "a"),
        ("An apple, the pear", "apple pear"),
        ("two dogs", "2 dogs"),
        ("Twenty", "20"),
        ("it's", "its"),
        ("it\u2019s", "its"),
        ("1,000 people", "1000 people"),
        ("1, 000", "1 000"),
        ("3.5 m", "3.5 m"),
        ("x=-1", "x -1"),
        ("x = \u22125", "x -5"),
        ("2-3", "2 3"),
        ("T-shirt", "t shirt"),
        ("\uff21\uff22", "ab"),
        ("Stra\u00dfe", "strasse"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_words_have_one_spelling(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
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
    ],
)
def test_a_short_answer_counts_wherever_it_stands_as_whole_words(
    answer: str, text: str, expected: float
) -> None:
    assert stands_in(answer, text) == bool(expected)
    assert ShortAnswer(("nothing", answer)).score(text) == expected


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("No, there is none.", "no"),
        ("**No**", "no"),
        ("There is no dog, yes.", "no"),
        ("I think the answer is YES", "yes"),
        ("Yes, there is no doubt.", "yes"),
        ("A dog is there.", None),
        ("nothing, yesterday", None),
        ("I cannot help with that.", None),
        (REFUSAL, None),
        ("", None),
    ],
)
def test_the_first_yes_or_no_counts_and_a_refusal_is_neither(text: str, first: str | None) -> None:
    assert YesNo(True).score(text) == float(first == "yes")
    assert YesNo(False).score(text) == float(first == "no")


def official_accuracy(said: str, answers: list[str]) -> float:
    """VQA's evaluation, answer by answer: each person's is left out once."""
    left_out = [answers[:place] + answers[place + 1 :] for place in range(len(answers))]
    return sum(min(1, others.count(said) / 3) for others in left_out) / len(left_out)


def test_ten_answers_are_scored_by_the_rule_of_vqa() -> None:
    for count in range(11):
        answers = ["red"] * count + ["green"] * (10 - count)
        for text, said in (("red", "red"), ("It is red.", "red"), ("Green!", "green"), ("blue", "blue")):
            expected = official_accuracy(said, answers)
            assert known_answer(answers).score(text) == pytest.approx(expected), (answers, text)
    assert known_answer(["red"] + ["green"] * 9).score("red") == pytest.approx(0.3)
    asked = known_answer(["yes"] * 8 + ["no"] * 2)
    for text, expected in (("Yes.", 1), ("No, it is not.", 0.6), ("no, or maybe yes", 0.6), ("A dog.", 0)):
        assert asked.score(text) == pytest.approx(expected), text


def test_of_people_s_answers_in_a_text_the_longest_counts_and_of_several_the_best() -> None:
    people = PeoplesAnswers(
        ("red", "red", "red", "red", "dark red", "dark red", "Dark red.", "blue", "", "?")
    )
    cases = {"red": 1, "It is dark red": 0.9, "blue": 0.3, "blue or red": 1, "": 0.3, "?": 0.3, "green": 0}
    for text, expected in cases.items():
        assert people.score(text) == pytest.approx(expected), text


def test_whether_a_thing_is_there_is_read_out_of_a_sentence() -> None:
    cases = {
        "Yes": True,
        "no.": False,
        "There is a dog in the image.": True,
        "There is no dog in the image.": False,
        "There isn't a dog.": False,
        "The image does not show a dog.": False,
        "I cannot see a dog there.": False,
        "None of them is a dog.": False,
        "Yes, there is a dog, not a cat.": True,
        "There is a dog. It has no collar and does not move.": True,
        "Let me look at it closely. No, I see none.": False,
        REFUSAL: None,
        "I'm sorry, but I can't assist with that.": None,
        "": None,
        "...": None,
    }
    for text, said in cases.items():
        assert Presence(True).said(text) is said, text
        assert (Presence(True).score(text), Presence(False).score(text)) == (said is True, said is False), (
            text
        )


CHOICES = ("red", "red fox", "a cat", "blue whale")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("**B**", 1),
        ("B. red fox", 1),
        ("(C) a cat", 2),
        ("The answer is B.", 1),
        ("Answer: C", 2),
        ("answer is (D), because it swims", 3),
        ("Option A", 0),
        ("I compare (A) with (B). The answer is (B).", 1),
        ("It can only be (D) here.", 3),
        ("A cat sits there.", 2),
        ("It is the Blue Whale!", 3),
        ("I see a red fox", 1),
        ("I see red", 0),
        ("a cat or a blue whale", None),
        ("The answer is D since whales are large", 3),
        ("The answer is A blue whale", 3),
        ("E", None),
        ("(A) or (B)", None),
        ("A large animal", None),
        (REFUSAL, None),
        ("", None),
    ],
)
def test_a_choice_is_made_by_letter_or_in_words(text: str, chosen: int | None) -> None:
    for index in range(len(CHOICES)):
        assert Choice(CHOICES, index).score(text) == float(index == chosen)


LONG = "the joke is that the names of both islands mislead"


@pytest.mark.parametrize(
    ("alternatives", "text", "expected"),
    [
        ((("-1", "-5"),), "x = 3", 0),
        ((("-1", "-5"),), "x = -1", 0.5),
        ((("-1", "-5"),), "x = -5 or 5", 0.5),
        ((("-1", "-5"),), "x = -1 or x = -5", 1),
        ((("dog",), ("hound",)), "a hound", 1),
        ((("dog", "cat"), ("hound",)), "a cat", 0.5),
        (((LONG,),), LONG.upper(), 1),
        (((LONG,),), "Both islands have names that mislead.", 4 / 5),
        (((LONG,),), REFUSAL, 0),
    ],
)
def test_elements_count_by_their_share_and_the_best_alternative_wins(
    alternatives: tuple[tuple[str, ...], ...], text: str, expected: float
) -> None:
    assert Elements(alternatives).score(text) == pytest.approx(expected)


def test_yes_and_no_are_known_by_their_answers() -> None:
    assert known_answer(["Yes"]) == YesNo(True)
    assert known_answer(["no", "No."]) == YesNo(False)
    assert known_answer(["no", "none"]) == ShortAnswer(("no", "none"))
    with pytest.raises(ValueError, match="both yes and no"):
        known_answer(["yes", "no"])
