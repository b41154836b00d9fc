from mllm_protector.records import (
    AnswerPair,
    Correction,
    LabelledAnswer,
    corrections,
    labelled_answers,
)

MIXED = AnswerPair(query="q1", accepted="good", rejected="bad")
BOTH_HARMFUL = AnswerPair(query="q2", accepted="less bad", rejected="worse", accepted_harmful=True)
BOTH_HARMLESS = AnswerPair(query="q3", accepted="better", rejected="good", rejected_harmful=False)


def test_a_pair_becomes_two_answers_with_their_own_labels_and_single_answers_pass():
    single = LabelledAnswer(query="q", answer="a", harmful=True)
    assert list(labelled_answers([MIXED, BOTH_HARMFUL, BOTH_HARMLESS, single])) == [
        LabelledAnswer(query="q1", answer="good", harmful=False),
        LabelledAnswer(query="q1", answer="bad", harmful=True),
        LabelledAnswer(query="q2", answer="less bad", harmful=True),
        LabelledAnswer(query="q2", answer="worse", harmful=True),
        LabelledAnswer(query="q3", answer="better", harmful=False),
        LabelledAnswer(query="q3", answer="good", harmful=False),
        single,
    ]


def test_corrections_replace_harmful_answers_by_a_harmless_one_or_if_wanted_by_the_safer_one():
    first = Correction(query="q1", rejected="bad", accepted="good")
    second = Correction(query="q2", rejected="worse", accepted="less bad")
    pairs = [MIXED, BOTH_HARMFUL, BOTH_HARMLESS]
    assert list(corrections(pairs)) == [first]
    assert list(corrections(pairs, both_harmful="safer")) == [first, second]
