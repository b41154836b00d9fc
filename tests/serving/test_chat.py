"""What is judged of a request and an answer, and how a reply is put back."""

import json
from typing import Any

import pytest

from mllm_protector.prompts import GAP
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.assembly import Assembly, chunks
from mllm_protector.serving.chat import query_of, read_request
from mllm_protector.serving.choices import Unreadable, calls_of, passed, replaced, text_of

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.invalid/canary.png"}}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_single_question_is_its_own_words() -> None:
    assert query_of([turn("user", "Why is the sky blue?")]) == "Why is the sky blue?"
    parts = [IMAGE, {"type": "text", "text": "What is this?"}]
    assert query_of([turn("system", "Be kind."), turn("user", parts)]) == "What is this?"


def test_a_dialogue_says_who_speaks_and_marks_turns_without_words() -> None:
    turns = [turn("user", "a"), turn("assistant", "b"), turn("tool", "c"), turn("user", [IMAGE])]
    assert query_of(turns) == "User: a\n\nAssistant: b\n\nTool: c\n\nUser: [image]"


def test_a_question_cannot_be_hidden_in_a_system_message() -> None:
    assert query_of([turn("system", "the question")]) == "the question"
    told = query_of([turn("developer", "the question"), turn("assistant", "Sure,")])
    assert told == "System: the question\n\nAssistant: Sure,"


def test_a_long_dialogue_keeps_its_head_and_its_tail() -> None:
    query = query_of([turn("user", "a" * 500), turn("user", "b" * 500)], most=100)
    assert len(query) == 100
    assert query.startswith("User: aaa")
    assert GAP in query
    assert query.endswith("bbb")


def test_a_request_that_cannot_be_guarded_is_refused() -> None:
    messages = [turn("user", "a")]
    for body, word in (
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "messages"),
        (b"[" * 100_000, "JSON"),
        (b'{"messages": [], "temperature": NaN}', "JSON"),
        (b'{"messages": [], "temperature": 1e999}', "JSON"),
        ({"messages": "a"}, "messages"),
        ({"messages": ["a"]}, "messages"),
        ({"messages": messages, "n": 9}, "n:"),
        ({"messages": messages, "n": True}, "n:"),
        ({"messages": messages, "n": 0}, "n:"),
        ({"messages": messages, "stream": "true"}, "stream"),
        ({"messages": messages, "Stream": True}, "stream"),
        ({"messages": messages, "modalities": ["text", "audio"]}, "text answers"),
        ({"messages": messages, "audio": {"voice": "x"}}, "text answers"),
    ):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        with pytest.raises(ApiError, match=word) as caught:
            read_request(raw, choices=8)
        assert caught.value.status == 400, body


def test_of_a_key_that_is_given_twice_only_the_value_that_was_read_is_sent() -> None:
    request = read_request(b'{"messages": [], "stream": false, "stream": true, "x": "\\ud800"}', choices=1)
    assert request.stream
    assert request.body == b'{"messages": [], "stream": true, "x": "\\ud800"}'


def test_all_words_of_a_message_are_judged_together() -> None:
    message = {"reasoning_content": "r", "reasoning": "r", "content": "c", "refusal": "f"}
    assert text_of(message) == "r\n\nc\n\nf"
    assert text_of({"content": [{"type": "text", "text": "c"}]}) == "c"
    assert text_of({"content": None}) == ""


def test_what_is_no_text_is_unreadable() -> None:
    for content in (3, [{"type": "image_url"}], [{"type": "text", "text": "a", "image": "b"}], [None]):
        with pytest.raises(Unreadable):
            text_of({"content": content})
    for calls in ("a", [3], {"a": 1}):
        with pytest.raises(Unreadable):
            calls_of({"tool_calls": calls})


def call(arguments: Any, name: str = "send") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_arguments_of_tool_calls_are_judged_as_the_words_that_they_stand_for() -> None:
    for arguments, words in (
        ('{"to": "a", "text": "b\\nc"}', ["to: a", "text: b\nc"]),
        ('{"text": "\\u0062\\u0061d"}', ["text: bad"]),
        ('{"text": "\\u0062\\u0061d', ["bad"]),
        ('{"a": "bad", "a": "good"}', ["a: bad", "a: good"]),
        ('{"a": ["x", {"b": "y"}], "n": 1}', ["a: x", "b: y", "n: 1"]),
        ('{"a": "{\\"b\\": \\"\\\\u0062ad\\"}"}', ["b: bad"]),
        ({"a": "x"}, ["a: x"]),
        ("plain", ["arguments: plain"]),
        ('{"n": %s, "b": "\\u0062ad"}' % ("1" * 5000), ["b: bad"]),
    ):
        text = calls_of({"tool_calls": [call(arguments)]})
        assert text.startswith("name: send\n"), arguments
        for word in words:
            assert word in text, arguments
    assert "x: bad" in calls_of({"function_call": {"name": "f", "arguments": '{"x": "bad"}'}})
    custom = {"id": "1", "type": "custom", "custom": {"name": "f", "input": "bad"}}
    assert "input: bad" in calls_of({"tool_calls": [custom]})
    assert calls_of({"content": "a"}) == ""


def test_fields_without_a_rule_are_dropped() -> None:
    choice = {"index": 1, "message": {"content": "a", "audio": "b"}, "finish_reason": "stop", "raw": "c"}
    assert passed(choice) == {"index": 1, "message": {"content": "a"}, "finish_reason": "stop"}


def test_a_replaced_choice_holds_nothing_of_the_raw_one() -> None:
    raw = {"content": "RAW", "reasoning": "RAW", "refusal": "RAW", "tool_calls": [call("RAW")]}
    choice = {"index": 2, "message": raw, "finish_reason": "length", "logprobs": {"content": ["RAW"]}}
    for structured in (False, True):
        made = replaced(choice, "safe", "stop", structured)
        assert "RAW" not in json.dumps(made)
        assert (made["index"], made["finish_reason"], made["logprobs"]) == (2, "stop", None)
        assert made["message"]["refusal" if structured else "content"] == "safe"


def test_fragments_of_mixed_choices_and_calls_become_one_answer() -> None:
    def part(index: int, end: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": end}]}

    def piece(index: int, arguments: str, **more: Any) -> list[dict[str, Any]]:
        return [{"index": index, **more, "function": {"arguments": arguments}}]

    assembly = Assembly(4)
    assembly.add(part(1, content="b"))
    assembly.add(part(0, content="a", reasoning_content="r"))
    assembly.add(part(1, content="c", end="stop"))
    assembly.add(part(0, tool_calls=piece(0, '{"x":', id="i0")))
    assembly.add(part(0, tool_calls=piece(1, "{}", id="i1")))
    assert not assembly.is_finished
    assembly.add(part(0, tool_calls=piece(0, " 1}"), end="tool_calls"))
    assert assembly.is_finished
    first, second = assembly.completion()["choices"]
    assert second["message"] == {"role": "assistant", "content": "bc"}
    arguments = [each["function"]["arguments"] for each in first["message"]["tool_calls"]]
    assert arguments == ['{"x": 1}', "{}"]

    again = Assembly(4)
    for each in chunks(assembly.completion(), alone=True, null=False):
        again.add(each)
    assert [choice["message"] for choice in again.completion()["choices"]] == [
        first["message"],
        second["message"],
    ]


def test_a_chunk_that_makes_no_sense_is_unreadable() -> None:
    for choice in (3, {"index": 9, "delta": {}}, {"index": -1}, {"index": 0, "delta": 3}):
        with pytest.raises(Unreadable):
            Assembly(4).add({"choices": [choice]})
    with pytest.raises(Unreadable):
        Assembly(4).add([])
    with pytest.raises(Unreadable):
        Assembly(4).add({"choices": [{"index": 0, "delta": {"content": {"a": 1}}}]})
