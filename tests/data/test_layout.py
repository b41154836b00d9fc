from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data.layout import SENTENCE, ends, fit, lay_out, window_starts

LENGTHS = st.integers(min_value=0, max_value=3000)
SIZES = st.integers(min_value=1, max_value=400)
SHARES = st.floats(min_value=0.0, max_value=0.5)
GAP = [-1, -1]


def test_the_texts_stand_in_their_gaps_between_the_affixes() -> None:
    layout = lay_out("a{query}b{answer}c", lambda text: [ord(text)], first=[1], last=[2, 3])
    assert layout.fill([7], [8, 8]) == [1, ord("a"), 7, ord("b"), 8, 8, ord("c"), 2, 3]
    assert layout.size == 6


@given(LENGTHS, SIZES, SHARES)
def test_windows_cover_every_token_in_order_and_none_is_longer_than_its_size(
    length: int, size: int, overlap: float
) -> None:
    starts = window_starts(length, size, overlap)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    windows = [range(start, min(start + size, length)) for start in starts]
    assert {token for window in windows for token in window} == set(range(length))
    assert windows[-1].stop == length
    assert all(len(window) == min(size, length) for window in windows)


@given(LENGTHS, SIZES, SHARES)
def test_neighbouring_windows_share_what_they_should(length: int, size: int, overlap: float) -> None:
    starts = window_starts(length, size, overlap)
    for one, other in pairwise(starts):
        shared = one + size - other
        assert shared >= min(max(overlap * size, SENTENCE), size // 2)
    assert all(one + size - other <= (size + 1) // 2 + SENTENCE for one, other in pairwise(starts[:-1]))


@given(LENGTHS, st.integers(min_value=2 * SENTENCE, max_value=400), st.integers(min_value=0))
def test_a_sentence_lies_whole_in_a_window(length: int, size: int, where: int) -> None:
    sentence = range(where % max(1, length - SENTENCE + 1), length)[:SENTENCE]
    assert any(
        start <= sentence.start and sentence.stop <= start + size for start in window_starts(length, size)
    )


@given(LENGTHS, SIZES)
def test_a_text_is_read_no_more_than_about_twice(length: int, size: int) -> None:
    read = len(window_starts(length, size)) * min(size, length)
    assert read <= 2 * length + 2 * size


def test_a_text_that_fits_is_one_window() -> None:
    assert window_starts(0, 8) == window_starts(0, 0) == window_starts(8, 8) == [0]
    assert window_starts(9, 8) == [0, 1]


def test_a_cut_text_keeps_its_head_and_its_tail() -> None:
    text = list(range(20))
    assert ends(text, 20, GAP) == text
    assert ends(text, 9, GAP) == [0, 1, 2, 3, *GAP, 17, 18, 19]
    assert ends(text, 4, GAP) == [0, *GAP, 19]
    assert ends(text, 3, GAP) == [0, 1, 19]
    assert ends(text, 1, GAP) == [0]
    assert ends(text, 0, GAP) == []


def test_what_fits_is_whole_and_what_does_not_leaves_both_texts_something() -> None:
    for asked, said, room in product(range(8), range(8), range(2, 9)):
        query, answer = fit([1] * asked, [2] * said, room, GAP)
        if asked + said <= room:
            assert (len(query), len(answer)) == (asked, said)
        else:
            assert len(query) + len(answer) == room
            assert len(query) >= min(asked, room // 2, 1)
            assert 1 in query or not asked
            assert 2 in answer or not said


def test_the_query_gives_way_first_but_keeps_half_of_the_room() -> None:
    for asked, kept in ((30, 30), (80, 50)):
        query, answer = fit([1] * asked, [2] * 500, 100, GAP)
        assert (len(query), len(answer)) == (kept, 100 - kept)
