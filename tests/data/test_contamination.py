import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

from mllm_protector.data.contamination import Finding, check_contamination, question_digest
from mllm_protector.data.duplicates import THRESHOLD
from mllm_protector.data.queries import words
from mllm_protector.errors import InputError

QUESTIONS = [
    "How can someone paint a wooden fence in one day?",
    "List the best ways to fold a paper boat for children.",
    "How can someone repair a broken chair in one day?",
]
CHANGED = [
    "How can someone paint a wooden fence in one day?",
    "HOW CAN SOMEONE, paint a wooden\nfence in one day",
    "How could someone paint a wooden fence in one day?",
    "How can someone paint a wooden fence within one day?",
    "How can someone quickly paint a wooden fence in one day?",
    "How can someone paint a fence in one day?",
    "Can someone paint a wooden fence in one day?",
    "How can someone paint a wooden fence in one?",
]
OTHERS = [
    "",
    "How can someone paint a garden fence in one week?",
    "How can someone sell a broken car in one day?",
    "One day in a fence, wooden: paint someone, can how?",
    "How so? " + " and so on, as we said before, ".join(words(QUESTIONS[0])),
]


def look(text: str, questions: list[str]) -> Finding:
    return check_contamination([text], {"name": questions}).findings["name"]


def found(text: str, questions: list[str] = QUESTIONS) -> list[int]:
    digests = [question_digest(question) for question in questions]
    return sorted(digests.index(digest) for digest in look(text, questions).found)


def test_a_question_is_found_alone_and_in_a_dialogue() -> None:
    for text in CHANGED:
        for before, after in (("", ""), ("Hi! Tell me. ", " I ask since it is old. " * 40)):
            assert found(before + text + after) == [0], text


def test_other_questions_and_scattered_words_are_not_found() -> None:
    for text in OTHERS:
        assert found(text) == [], text


def test_short_questions_must_be_there_word_by_word() -> None:
    questions = ["How do I fold paper?", "Is it old?"]
    assert found("Please: how do I FOLD paper", questions) == [0]
    assert found("How do I cut paper?", questions) == []
    assert found("is it old", questions) == [1]
    assert found("Tell me, is it old?", questions) == []


def test_equal_questions_count_once_and_empty_ones_never() -> None:
    several = look("how do i fold paper", ["", "?!", "How do I fold paper?", "how do I fold paper"])
    assert (several.questions, sum(several.found.values())) == (1, 1)
    assert (look("", ["", "?!"]).questions, look("", ["", "?!"]).rows) == (0, 0)


def test_an_example_shows_the_passage_and_its_share() -> None:
    filler = " ".join(f"filler{number}" for number in range(100))
    [example] = look(f"{filler} {CHANGED[2]} {filler}", QUESTIONS).examples
    assert (example["question"], example["share"]) == (QUESTIONS[0], 0.9)
    assert "filler99 how could someone paint a wooden fence in one day filler0" in example["text"]
    assert len(example["text"]) <= 200


WORDS = st.lists(st.sampled_from("abcdef"), min_size=4, max_size=9)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), st.lists(st.sampled_from("abcdefg"), max_size=25))
def test_nothing_is_overlooked_and_nothing_added(questions: list[list[str]], text: list[str]) -> None:
    expected = set()
    for question in questions:
        blanks = [""] * len(question)
        padded = [*blanks, *text, *blanks]
        passages = (padded[start : start + len(question)] for start in range(len(padded) - len(question) + 1))
        share = max(LCSseq.similarity(question, passage) for passage in passages) / len(question)
        if share >= THRESHOLD:
            expected.add(question_digest(" ".join(question)))
    assert look(" ".join(text), [" ".join(each) for each in questions]).found.keys() == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_any_changed_word_in_any_place_is_found(seed: int) -> None:
    draw = random.Random(seed)
    question = [f"w{draw.randrange(50)}" for _ in range(draw.randrange(7, 100))]
    text = list(question)
    at = draw.randrange(len(text))
    text[at : at + draw.randrange(2)] = draw.choice([[], ["other"]])
    around = [f"w{draw.randrange(50)}" for _ in range(draw.randrange(100))]
    assert found(" ".join([*around, *text, *around]), [" ".join(question)]) == [0]


def test_the_check_counts_rows_and_questions_by_benchmark() -> None:
    benchmarks = {"first": [*QUESTIONS, QUESTIONS[0].upper(), "?"], "second": [QUESTIONS[0]], "third": []}
    texts = [CHANGED[3], "Nothing.", f"{QUESTIONS[0]} {QUESTIONS[2]}", QUESTIONS[1]]
    result = check_contamination(iter(texts), benchmarks)
    assert result.rows.tolist() == [0, 2, 3]
    assert result.rows.dtype == np.int64
    first, second, third = (json.loads(json.dumps(result.as_json()))[name] for name in benchmarks)
    assert (first["questions"], first["rows"], first["threshold"]) == (3, 3, THRESHOLD)
    digests = [question_digest(question) for question in QUESTIONS]
    assert first["found"] == dict(zip(digests, [2, 1, 1], strict=True))
    assert list(first["found"]) == sorted(digests)
    assert (second["rows"], second["found"]) == (2, {digests[0]: 2})
    assert (third["questions"], third["rows"], third["found"], third["examples"]) == (0, 0, {}, [])
    shown = {"row": 0, "question": QUESTIONS[0].upper(), "text": " ".join(words(CHANGED[3])), "share": 0.9}
    assert first["examples"][0] == shown


def test_examples_are_few_and_short() -> None:
    question = " ".join(f"word{number}" for number in range(100))
    [finding] = check_contamination([question] * 30, {"long": [question]}).findings.values()
    assert (finding.rows, len(finding.examples)) == (30, 10)
    assert all(len(example["text"]) <= 200 for example in finding.examples)


def test_digest_and_fingerprint_are_of_the_words_alone() -> None:
    assert question_digest(CHANGED[0]) == question_digest(CHANGED[1]) != question_digest(CHANGED[2])
    assert len(question_digest("")) == 16
    again = [*reversed(QUESTIONS), CHANGED[1]]
    assert look("", QUESTIONS).fingerprint == look("", again).fingerprint
    assert look("", QUESTIONS).fingerprint != look("", QUESTIONS[:2]).fingerprint


def test_a_threshold_out_of_range_is_refused() -> None:
    for threshold in (0.5, 1.01, float("nan")):
        with pytest.raises(InputError, match=f"threshold={threshold}"):
            check_contamination([], {"name": QUESTIONS}, threshold=threshold)
