import gc
import os
import random
import subprocess
import sys
import unicodedata
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

from mllm_protector.data import duplicates, table
from mllm_protector.data.duplicates import THRESHOLD, near_duplicates
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


def test_case_punctuation_form_and_spacing_do_not_count() -> None:
    for other in (
        "how do i BAKE bread, at home",
        " How do I\tbake   bread\u2014at home?! ",
        "How do I bake \uff42\uff52\uff45\uff41\uff44 at home",
        "How do I b\u00adake br\u200bead at home",
    ):
        assert words(other) == words("How do I bake bread at home?"), ascii(other)


def test_words_of_any_script_are_compared() -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words(unicodedata.normalize(form, "Stra\u00dfe, caf\u00e9 \u212b")) == [
            "strasse",
            "caf\u00e9",
            "\u00e5",
        ]
    assert words("Don\u2019t, don't \ud800") == ["dont", "dont"]
    assert words("\u5982\u4f55\u70e4\u9762\u5305\uff1f") == list("\u5982\u4f55\u70e4\u9762\u5305")
    assert words(" \n?!") == []


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


def test_a_share_below_the_threshold_is_never_enough() -> None:
    original = " ".join(VOCABULARY[:20])
    near = " ".join([*VOCABULARY[:17], "x", "y", "z"])
    far = " ".join([*VOCABULARY[:16], "x", "y", "z", "w"])
    assert firsts([original, near]) == [0, 0]
    assert firsts([original, far]) == [0, 1]
    assert firsts([original, " ".join(reversed(VOCABULARY[:20]))]) == [0, 1]


def test_nearness_is_not_passed_on() -> None:
    chain = [" ".join([*VOCABULARY[:start], *VOCABULARY[100 + start : 120]]) for start in range(0, 20, 2)]
    found = firsts(chain)
    assert found[:3] == [0, 0, 2]
    assert all(share(chain[row], chain[first]) >= THRESHOLD for row, first in enumerate(found))
    assert max(found) > 6


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


def test_the_order_of_rows_only_decides_who_is_first() -> None:
    texts = [variant for text in made_up(200, 30) for variant in (text, f"{text} end", f"so {text}")]
    order = random.Random(2).sample(range(len(texts)), len(texts))
    found = firsts([texts[row] for row in order])
    for row, first in enumerate(found):
        assert order[first] // 3 == order[row] // 3
    assert len(set(found)) == 200


def test_the_result_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random; from mllm_protector.data.duplicates import near_duplicates\n"
        "draw = random.Random(0)\n"
        "texts = [' '.join(draw.choices('abcdefghijkl', k=9)) for _ in range(400)]\n"
        "print(near_duplicates(texts, threshold=0.75).tolist())"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert results[0] == results[1] != str([*range(400)])


class Text(str):
    """One that tells when it is gone."""


class Streamed(Sequence[str]):
    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.most = 0
        self._alive: set[int] = set()

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, row: Any) -> Any:
        text = Text(self._texts[row])
        self._alive.add(id(text))
        weakref.finalize(text, self._alive.discard, id(text))
        self.most = max(self.most, len(self._alive))
        return text

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


def test_no_more_than_a_batch_of_texts_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BATCH", 50)
    texts = Streamed(made_up(500, 8) * 2)
    assert firsts(texts) == [*range(500)] * 2
    gc.collect()
    assert texts.most <= 2 * 50 + 256


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
    assert 0 < compared <= duplicates._KEPT * len(texts)


def test_in_a_bucket_of_all_rows_each_is_paired_with_a_few() -> None:
    rows = 10_000
    pairs = list(duplicates._neighbours(np.zeros((rows, 4), dtype=np.uint8)))
    assert len(pairs) == duplicates._NEIGHBOURS + 1
    for later, earlier in pairs:
        assert len(set(later.tolist())) == len(later)
        assert (earlier < later).all()
    assert set(pairs[-1][1].tolist()) == {0}


def test_a_group_of_thousands_has_one_first() -> None:
    template = made_up(1, 30, seed=4)[0]
    variants = [f"{template} {word}" for word in VOCABULARY]
    assert (
        firsts([*made_up(5, 30), *variants, *[" ?"] * 100]) == [0, 1, 2, 3, 4] + [5] * 2_000 + [2_005] * 100
    )


def test_no_text_and_one_text() -> None:
    assert firsts([]) == []
    assert firsts([""]) == [0]


def test_a_threshold_out_of_range_is_refused() -> None:
    for threshold in (0.5, 1.01, -1.0, float("nan")):
        with pytest.raises(InputError, match=f"threshold={threshold}"):
            near_duplicates(["a"], threshold=threshold)
