import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.errors import InputError
from mllm_protector.generation.replies import LONGEST, Replies, answer_in, questions_in
from mllm_protector.records import CutText, Failure

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


def test_replies_are_there_for_the_next_run_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    replies = Replies(path, 5)
    texts = {"a": "one", "b": CutText("two"), "c": "half \ud800", "d": ""}
    for key, text in texts.items():
        replies.keep(key, text)
    replies.keep("e", Failure(reason="no"))
    with path.open("ab") as file:
        file.write(b'{"key": "f", "te')
    again = Replies(path, 7)
    assert again.texts == texts
    assert isinstance(again.texts["b"], CutText)
    assert (replies.left, again.calls, again.left) == (0, 5, 2)
    again.keep("e", "at last")
    assert Replies(path, None).texts == texts | {"e": "at last"}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"key": "a", "text": "b", "cut": false}\n{"key": "c"}\n')
    with pytest.raises(InputError, match=f"^{path}:2: damaged .*; remove the line"):
        Replies(path, None)
