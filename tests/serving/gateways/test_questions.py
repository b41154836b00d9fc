"""Questions are kept for a while, and never more than fit."""

from mllm_protector.serving.gateways.questions import Questions


def test_a_question_is_found_until_its_time_is_over() -> None:
    now = [0.0]
    questions = Questions(seconds=10, clock=lambda: now[0])
    questions.keep("a", "1", "Why?")
    now[0] = 9.0
    questions.keep("a", "2", "Who?")
    assert questions.find("a", "1") == "Why?"
    assert questions.find("b", "1") is None
    now[0] = 10.0
    assert (questions.find("a", "1"), questions.find("a", "2")) == (None, "Who?")
    questions.keep("a", "1", "How?")
    assert questions.find("a", "1") == "How?"


def test_the_oldest_go_when_there_are_too_many_or_too_long_ones() -> None:
    questions = Questions(most=2)
    for call in "123":
        questions.keep(None, call, "Why?")
    assert [questions.find(None, call) for call in "123"] == [None, "Why?", "Why?"]
    short = Questions(characters=12)
    for call in "123":
        short.keep(None, call, "Why??")
    assert [short.find(None, call) for call in "123"] == [None, "Why??", "Why??"]
    short.keep(None, "4", "x" * 100)
    assert short.find(None, "4") is None


def test_a_doubtful_question_stays_doubtful() -> None:
    questions = Questions()
    for text in ("Why?", "How?", "Why?"):
        questions.keep(None, "1", text)
    assert questions.find(None, "1") is None
