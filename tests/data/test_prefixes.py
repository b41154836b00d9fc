import re
from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.data.tokenized import with_prefixes
from mllm_protector.data.toy import toy_pairs
from mllm_protector.records import LabelledAnswer, labelled_answers

RECORDS = list(labelled_answers(toy_pairs("train")))

ANY_RECORD = st.builds(LabelledAnswer, query=st.text(), answer=st.text(), harmful=st.booleans())


def whole(prefix: LabelledAnswer) -> LabelledAnswer:
    return next(
        record
        for record in RECORDS
        if record.query == prefix.query and record.answer.startswith(prefix.answer)
    )


def prefixes_of(records: list[LabelledAnswer], *, share: float, seed: int) -> list[LabelledAnswer]:
    """What is added to the records, each of which must come back as it is."""
    waiting, added = list(records), []
    for record in with_prefixes(records, share=share, seed=seed):
        if waiting and record is waiting[0]:
            waiting.pop(0)
        else:
            added.append(record)
    assert not waiting
    return added


def test_a_share_of_the_records_is_followed_by_a_prefix() -> None:
    made = list(with_prefixes(RECORDS, share=0.3, seed=0))
    assert 0.27 < (len(made) - len(RECORDS)) / len(RECORDS) < 0.33
    for record, prefix in pairwise(made):
        if prefix not in RECORDS:
            assert record.query == prefix.query
            assert record.answer.startswith(prefix.answer)


def test_a_prefix_ends_with_a_word_and_has_the_label_of_its_answer() -> None:
    for prefix in prefixes_of(RECORDS, share=0.2, seed=1):
        record = whole(prefix)
        rest = record.answer[len(prefix.answer) :]
        assert prefix.harmful == record.harmful
        assert prefix.answer[-1].isalnum()
        assert not rest[0].isalnum()
        assert (0.5 if record.harmful else 0.1) <= len(prefix.answer) / len(record.answer) <= 0.9


def test_prefixes_of_harmless_answers_are_also_short() -> None:
    shares = [
        len(prefix.answer) / len(whole(prefix).answer)
        for prefix in prefixes_of(RECORDS, share=0.3, seed=0)
        if not prefix.harmful
    ]
    assert min(shares) < 0.2
    assert max(shares) > 0.8


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    made = list(with_prefixes(RECORDS, share=0.3, seed=0))
    assert list(with_prefixes(RECORDS, share=0.3, seed=0)) == made
    assert list(with_prefixes(RECORDS, share=0.3, seed=1)) != made
    assert Counter(with_prefixes(RECORDS[::-1], share=0.3, seed=0)) == Counter(made)


def test_a_share_of_nothing_adds_nothing_and_of_all_one_to_each() -> None:
    assert list(with_prefixes(RECORDS, share=0, seed=0)) == RECORDS
    assert len(list(with_prefixes(RECORDS, share=1, seed=0))) == 2 * len(RECORDS)


def test_a_text_without_a_second_word_gives_no_prefix() -> None:
    for answer in ("", "No.", "word", "...", "don't"):
        for harmful in (True, False):
            record = LabelledAnswer(query="q", answer=answer, harmful=harmful)
            assert prefixes_of([record], share=1, seed=0) == []


@given(st.lists(ANY_RECORD, max_size=5), st.integers())
def test_any_text_is_cut_properly_or_not_at_all(records: list[LabelledAnswer], seed: int) -> None:
    for prefix in prefixes_of(records, share=1, seed=seed):
        assert re.search(r"\w$", prefix.answer)
        assert any(
            record.query == prefix.query
            and record.harmful == prefix.harmful
            and record.answer.startswith(prefix.answer)
            and len(record.answer) > len(prefix.answer)
            for record in records
        )
