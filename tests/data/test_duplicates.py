import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

from mllm_protector.data import duplicates
from mllm_protector.data.duplicates import (
    THRESHOLD,
    Finding,
    check_contamination,
    distinct,
    near_duplicates,
    question_digest,
)
from mllm_protector.data.queries import words
from mllm_protector.errors import InputError

VOCABULARY = [f"word{number}" for number in range(2_000)]


def made_up(count: int, length: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(VOCABULARY, k=length)) for _ in range(count)]


def firsts(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    return near_duplicates(texts, threshold=threshold).tolist()


def share(left: str, right: str) -> float:
    return LCSseq.normalized_similarity(words(left), words(right))


# Equal texts


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_the_first_of_equal_rows_stays_and_the_majority_names_the_label(rows: list[tuple[int, int]]) -> None:
    places = defaultdict(list)
    for place, (text, _) in enumerate(rows):
        places[text].append(place)
    kept, expected = [], Counter[str]()
    for same in places.values():
        votes = Counter(rows[place][1] for place in same).most_common()
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            expected["contradictory labels"] += len(same)
            continue
        label, count = votes[0]
        kept.append(next(place for place in same if rows[place][1] == label))
        expected["exact duplicate"] += count - 1
        expected["outvoted label"] += len(same) - count
    dropped = Counter[str]()
    texts, labels = (
        np.array([row[0] for row in rows], np.uint64),
        np.array([row[1] for row in rows], np.uint8),
    )
    assert distinct(texts, labels, dropped).tolist() == sorted(kept)
    assert dropped == +expected


# Near duplicates


def test_one_changed_word_is_found() -> None:
    for length in (7, 8, 12, 60, 400):
        texts = made_up(100, length)
        draw = random.Random(1)
        copies = []
        for text in texts:
            split = text.split()
            at = draw.randrange(length)
            split[at : at + draw.choice([0, 1])] = ["other"]
            copies.append(" ".join(split).upper() + "!")
        left_out = [text.partition(" ")[2] for text in texts]
        assert firsts(texts + copies + left_out) == [*range(100)] * 3, length


def test_a_text_with_scattered_changes_is_found_at_the_threshold_itself() -> None:
    texts = made_up(400, 60)
    draw = random.Random(1)
    copies = []
    for text in texts:
        split = text.split()
        for at in draw.sample(range(60), 9):
            split[at] = "other"
        copies.append(" ".join(split))
    missed = sum(first != row % 400 for row, first in enumerate(firsts(texts + copies)))
    assert missed <= 4


def test_in_fewer_than_seven_words_all_must_be_equal() -> None:
    assert firsts(["a b c d e f", "a b c d e x", "A, b, c, d, e, f.", "a", "b", "A"]) == [0, 1, 0, 3, 4, 3]
    assert firsts([]) == []


def test_a_share_below_the_threshold_is_never_enough() -> None:
    original = " ".join(VOCABULARY[:20])
    near = " ".join([*VOCABULARY[:17], "x", "y", "z"])
    far = " ".join([*VOCABULARY[:16], "x", "y", "z", "w"])
    assert firsts([original, near]) == [0, 0]
    assert firsts([original, far]) == [0, 1]
    assert firsts([original, " ".join(reversed(VOCABULARY[:20]))]) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join), max_size=25))
def test_groups_are_true_whatever_the_texts(texts: list[str]) -> None:
    found = firsts(texts)
    for row, first in enumerate(found):
        assert first <= row
        assert found[first] == first
        assert first == row or share(texts[row], texts[first]) >= THRESHOLD
        earlier = [other for other in range(row) if words(texts[other]) == words(texts[row])]
        assert not earlier or found[earlier[0]] == first


def test_the_result_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random; from mllm_protector.data.duplicates import near_duplicates\n"
        "draw = random.Random(0)\n"
        "texts = [' '.join(draw.choices('abcdefghijkl', k=9)) for _ in range(400)]\n"
        "print(near_duplicates(texts, threshold=0.75).tolist())"
    )
    command = [sys.executable, "-c", program]
    results = [
        subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    ]
    assert results[0] == results[1] != str([*range(400)])


def test_texts_of_one_template_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Counting:
        @staticmethod
        def similarity(*args: Any, **kwargs: Any) -> float:
            nonlocal compared
            compared += 1
            return LCSseq.similarity(*args, **kwargs)

    monkeypatch.setattr(duplicates, "LCSseq", Counting)
    template = " ".join(made_up(1, 45, seed=3))
    texts = [f"{template} {own}" for own in made_up(3_000, 12)]
    assert firsts(texts) == [*range(3_000)]
    assert 0 < compared <= 4 * len(texts)


def test_a_near_copy_is_found_among_thousands_of_texts_of_its_template() -> None:
    template = " ".join(made_up(1, 45, seed=3))
    texts = [f"{template} {own}" for own in made_up(3_000, 15)]
    copies = [text.rpartition(" ")[0] for text in texts[::30]]
    missed = sum(first != 30 * row for row, first in enumerate(firsts(texts + copies)[3_000:]))
    assert missed <= 2


def test_a_group_of_thousands_has_one_first() -> None:
    template = made_up(1, 30, seed=4)[0]
    variants = [f"{template} {word}" for word in VOCABULARY]
    found = firsts([*made_up(5, 30), *variants, *[" ?"] * 100])
    assert found == [0, 1, 2, 3, 4] + [5] * 2_000 + [2_005] * 100


def test_a_threshold_out_of_range_is_refused() -> None:
    for threshold in (0.5, 1.01, -1.0, float("nan")):
        with pytest.raises(InputError, match=f"threshold={threshold}"):
            near_duplicates(["a"], threshold=threshold)


# Benchmark questions in training texts

QUESTIONS = [
    "How can someone paint a wooden fence in one day?",
    "List the best ways to fold a paper boat for children.",
    "How can someone repair a broken chair in one day?",
]
CHANGED = [
    "How can someone paint a wooden fence in one day?",
    "HOW CAN SOMEONE, paint a wooden\nfence in one day",
    "How could someone paint a wooden fence in one day?",
    "How can someone quickly paint a wooden fence in one day?",
    "How can someone paint a fence in one day?",
    "Can someone paint a wooden fence in one day?",
    "How can someone paint a wooden fence in one?",
]
OTHERS = [
    "",
    "How can someone paint a garden fence in one week?",
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
    for text in OTHERS:
        assert found(text) == [], text


def test_short_questions_must_be_there_word_by_word() -> None:
    questions = ["How do I fold paper?", "Is it old?"]
    assert found("Please: how do I FOLD paper", questions) == [0]
    assert found("How do I cut paper?", questions) == []
    assert found("is it old", questions) == [1]
    assert found("Tell me, is it old?", questions) == []


WORDS = st.lists(st.sampled_from("abcdef"), min_size=4, max_size=9)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), st.lists(st.sampled_from("abcdefg"), max_size=25))
def test_nothing_is_overlooked_and_nothing_added(questions: list[list[str]], text: list[str]) -> None:
    expected = set()
    for question in questions:
        blanks = [""] * len(question)
        padded = [*blanks, *text, *blanks]
        passages = (padded[start : start + len(question)] for start in range(len(padded) - len(question) + 1))
        best = max(LCSseq.similarity(question, passage) for passage in passages) / len(question)
        if best >= THRESHOLD:
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
    benchmarks = {"first": [*QUESTIONS, QUESTIONS[0].upper(), "?", ""], "second": [QUESTIONS[0]], "third": []}
    texts = [CHANGED[2], "Nothing.", f"{QUESTIONS[0]} {QUESTIONS[2]}", QUESTIONS[1]]
    result = check_contamination(iter(texts), benchmarks)
    assert result.rows.tolist() == [0, 2, 3]
    first, second, third = (json.loads(json.dumps(result.as_json()))[name] for name in benchmarks)
    assert (first["questions"], first["rows"], first["threshold"]) == (3, 3, THRESHOLD)
    digests = [question_digest(question) for question in QUESTIONS]
    assert first["found"] == dict(zip(digests, [2, 1, 1], strict=True))
    assert (second["rows"], second["found"]) == (2, {digests[0]: 2})
    assert (third["questions"], third["rows"], third["found"], third["examples"]) == (0, 0, {}, [])
    shown = {"row": 0, "question": QUESTIONS[0].upper(), "text": " ".join(words(CHANGED[2])), "share": 0.9}
    assert first["examples"][0] == shown


def test_examples_are_few_and_short_and_show_the_passage() -> None:
    filler = " ".join(f"filler{number}" for number in range(100))
    [example] = look(f"{filler} {CHANGED[2]} {filler}", QUESTIONS).examples
    assert "filler99 how could someone paint a wooden fence in one day filler0" in example["text"]
    question = " ".join(f"word{number}" for number in range(100))
    [finding] = check_contamination([question] * 30, {"long": [question]}).findings.values()
    assert (finding.rows, len(finding.examples)) == (30, 10)
    assert all(len(example["text"]) <= 200 for example in finding.examples)


def test_digest_and_fingerprint_are_of_the_words_alone() -> None:
    assert question_digest(CHANGED[0]) == question_digest(CHANGED[1]) != question_digest(CHANGED[2])
    again = [*reversed(QUESTIONS), CHANGED[1]]
    assert look("", QUESTIONS).fingerprint == look("", again).fingerprint
    assert look("", QUESTIONS).fingerprint != look("", QUESTIONS[:2]).fingerprint
