"""Streams: held, judged and released, or passed through where that was asked for."""

import json
import threading
from typing import Any

import httpx

from mllm_protector.prompts import REFUSAL
from tests.serving.fakes import (
    DONE,
    HTTP,
    SAFE,
    USAGE,
    USAGE_CHUNK,
    Served,
    WordGuard,
    chunk,
    completion,
    message,
    served,
    stream,
)
from tests.serving.test_proxy import DETAILS, QUESTION, saying, to


def ask(on: Served, **headers: str) -> httpx.Response:
    body = {**QUESTION, "stream": True}
    return HTTP.post(f"{on.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def told(answer: httpx.Response) -> list[Any]:
    """The events of an answer, as JSON; the last one is [DONE]."""
    events = [event[6:] for event in answer.text.split("\n\n") if event.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def words(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ends(events: list[Any]) -> list[str]:
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    return [reason for reason in reasons if reason]


def test_a_stream_is_released_when_all_of_it_is_judged() -> None:
    raw = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Be"}),
        chunk({"content": "cause."}),
    ]
    with served(saying(stream(*raw, chunk({}, end="length"), DONE)), to) as on:
        answer = ask(on)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-mllm-protector"] == "allowed"
        events = told(answer)
        assert (words(events), ends(events)) == ("Because.", ["length"])
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert on.guard.asked == [("Why?", "Because.", None)]
        assert on.count("unscanned_bytes_total") == 0 < on.count("released_bytes_total")


def test_a_word_that_is_cut_over_chunks_is_found_and_nothing_of_it_released() -> None:
    raw = [chunk({"content": "FORB"}, logprobs={"content": [{"token": "FORB"}]}), chunk({"content": "IDDEN"})]
    with served(saying(stream(*raw, chunk({}, end="length"), DONE)), to) as on:
        answer = ask(on, **DETAILS)
        events = told(answer)
        assert (words(events), ends(events)) == (SAFE, ["stop"])
        assert answer.headers["x-mllm-protector"] == "rewritten"
        assert "FORB" not in answer.text
        expected = {"outcome": "rewritten", "choices": [{"index": 0, "outcome": "rewritten", "score": 0.9}]}
        assert events[-1]["mllm_protector"] == expected


def test_mixed_choices_are_judged_by_their_index() -> None:
    raw = [
        chunk({"content": "FORB"}, index=1),
        chunk({"content": "fine"}),
        chunk({"content": "IDDEN"}, index=1),
    ]
    raw += [chunk({}, index=1, end="stop"), chunk({}, end="stop")]
    with served(saying(stream(*raw, DONE)), to) as on:
        events = told(ask(on))
        assert (words(events, 0), words(events, 1)) == ("fine", SAFE)


def test_a_tool_call_is_put_together_before_it_is_judged() -> None:
    def part(arguments: str, **more: Any) -> bytes:
        return chunk({"tool_calls": [{"index": 0, **more, "function": {"arguments": arguments}}]})

    for word, outcome in (("FORBIDDEN", "refused"), ("harmless", "allowed")):
        raw = [part('{"a": "' + word[:4], id="1", type="function"), part(word[4:] + '"}')]
        with served(saying(stream(*raw, chunk({}, end="tool_calls"), DONE)), to) as on:
            answer = ask(on)
            assert answer.headers["x-mllm-protector"] == outcome
            events = told(answer)
            calls = [each for event in events for each in event["choices"][0]["delta"].get("tool_calls", [])]
            if outcome == "allowed":
                assert calls[0]["function"]["arguments"] == '{"a": "harmless"}'
                assert (calls[0]["id"], ends(events)) == ("1", ["tool_calls"])
            else:
                assert (calls, words(events), ends(events)) == ([], REFUSAL, ["content_filter"])


def test_the_usage_comes_in_the_shape_of_the_upstream_and_only_if_it_came() -> None:
    text, end = chunk({"content": "fine"}), chunk({}, end="stop")
    with served(saying(stream(text, end, DONE)), to) as on:
        assert all("usage" not in event for event in told(ask(on)))
    nothing = chunk({"content": "fine"}, usage=None)
    with served(saying(stream(nothing, end, USAGE_CHUNK, DONE)), to) as on:
        events = told(ask(on))
        assert (events[-1]["choices"], events[-1]["usage"]) == ([], USAGE)
        assert all(event["usage"] is None for event in events[:-1])
    with served(saying(stream(text, chunk({}, end="stop", usage=USAGE), DONE)), to) as on:
        events = told(ask(on))
        assert events[-1]["choices"]
        assert events[-1]["usage"] == USAGE
        assert all("usage" not in event for event in events[:-1])


def test_a_slow_guard_or_upstream_is_bridged_by_comments() -> None:
    raw = stream(chunk({"content": "FORBIDDEN"}), 0.3, chunk({}, end="stop"), DONE)
    with served(saying(raw), lambda url: to(url, policy={"ping_s": 0.02}), WordGuard(0.3)) as on:
        answer = ask(on, **DETAILS)
        assert answer.text.count(": ping\n\n") >= 3
        assert answer.headers["x-mllm-protector"] == "pending"
        events = told(answer)
        assert words(events) == SAFE
        assert events[-1]["mllm_protector"]["outcome"] == "rewritten"


def test_comments_come_while_nothing_else_does() -> None:
    came, in_time, pieces = threading.Event(), list[bool](), list[bytes]()
    raw = stream(
        chunk({"content": "fine"}), lambda: in_time.append(came.wait(8)), chunk({}, end="stop"), DONE
    )
    with served(saying(raw), lambda url: to(url, policy={"ping_s": 0.1})) as on:
        body = {**QUESTION, "stream": True}
        with HTTP.stream("POST", f"{on.url}/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_bytes():
                pieces.append(piece)
                came.set()
        assert pieces[0].startswith(b": ping")
        assert in_time == [True]  # the upstream went on when the client had it


def test_an_answer_that_is_no_stream_is_released_as_one() -> None:
    with served(saying(completion(message("FORBIDDEN"))), to) as on:
        events = told(ask(on))
        assert (words(events), events[-1]["usage"]) == (SAFE, USAGE)


def test_shadow_mode_releases_what_came_and_says_what_would_have_happened() -> None:
    raw = [b": note\n\n", chunk({"content": "FORBIDDEN"}, extra=1), chunk({}, end="stop")]
    with served(saying(stream(*raw, DONE)), lambda url: to(url, policy={"shadow": True})) as on:
        answer = ask(on)
        assert answer.headers["x-mllm-protector"] == "shadow-rewritten"
        assert answer.content == b"".join(raw[1:]) + DONE
        assert on.count("unscanned_bytes_total") == 0
    down = [chunk({"content": "DOWN"}), chunk({}, end="stop")]
    with served(saying(stream(*down, DONE)), lambda url: to(url, policy={"shadow": True})) as on:
        assert ask(on).headers["x-mllm-protector"] == "shadow-guard_error"
        assert on.count("unscanned_bytes_total") > 0


def test_off_passes_everything_and_counts_it() -> None:
    raw = [chunk({"content": "FORBIDDEN"}), chunk({}, end="stop")]
    with served(saying(stream(*raw, DONE)), lambda url: to(url, policy={"streaming": "off"})) as on:
        answer = ask(on)
        assert answer.content == b"".join(raw) + DONE
        assert answer.headers["x-mllm-protector"] == "unguarded"
        assert on.count("unscanned_bytes_total") == len(answer.content)
        assert not on.guard.asked


def test_a_guard_that_fails_is_an_error_if_nothing_was_sent_and_a_frame_if_it_was() -> None:
    raw = stream(chunk({"content": "DOWN"}), chunk({}, end="stop"), DONE)
    with served(saying(raw), lambda url: to(url, policy={"on_error": "error"})) as on:
        assert ask(on).status_code == 503
    policy = {"on_error": "error", "ping_s": 0.05}
    with served(saying(raw), lambda url: to(url, policy=policy), WordGuard(0.3)) as on:
        answer = ask(on)
        assert answer.status_code == 200
        [event] = told(answer)
        assert event["error"]["code"] == "guard_unavailable"
    with served(saying(raw), to) as on:
        assert words(told(ask(on))) == REFUSAL
