import json

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.generation.replies import LONGEST, answer_in, questions_in

LISTS = (
    ("json", '["Why?", "How?"]', ["Why?", "How?"]),
    ("json", '```json\n["Why?"]\n```', ["Why?"]),
    ("json", '<think>["no"]</think>\n["Why?"]', ["Why?"]),
    ("json", ' [" Why? "] ', ["Why?"]),
    ("lines", "1. Why?\n\n2) How?\n- What?\nWho?", ["Why?", "How?", "What?", "Who?"]),
    ("lines", "3 is a number?", ["3 is a number?"]),
)
NO_LISTS = (
    *("", " ", "[]", "{}", '{"questions": ["Why?"]}', '["Why?"', '["Why?", 3]', '["Why?", ""]'),
    *('["Why?", null]', '[["Why?"]]', 'Here they are: ["Why?"]', '["Why?"] ["How?"]', "Why?"),
    *('["a\\u0000b"]', '["half \\ud800 pair"]', "[" * 100_000, json.dumps(["x" * (LONGEST + 1)])),
)


def test_a_list_of_questions_is_read_and_nothing_else_is() -> None:
    for form, reply, expected in LISTS:
        assert questions_in(reply, form) == expected, reply  # type: ignore[arg-type]
    for reply in NO_LISTS:
        assert questions_in(reply, "json") is None, reply[:50]
    for reply in ("", "\n", "1.\n\0", "x" * (LONGEST + 1)):
        assert questions_in(reply, "lines") is None, reply[:50]


@given(st.text())
def test_any_reply_is_read_without_an_error_and_gives_clean_texts(reply: str) -> None:
    for form in ("json", "lines"):
        for question in questions_in(reply, form) or []:  # type: ignore[arg-type]
            assert question == question.strip() != ""
            question.encode()


def test_an_answer_is_the_text_after_the_thoughts() -> None:
    for reply, expected in (
        (" an answer\n", "an answer"),
        ("<think>hm</think> so", "so"),
        ("a\0b", None),
        ("\udc00", None),
        (" ", None),
    ):
        assert answer_in(reply) == expected, repr(reply)
