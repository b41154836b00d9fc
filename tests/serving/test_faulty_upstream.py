"""What a transparent proxy must get right, and what it does when the upstream or the client does not.

The numbers count the traps of a transparent proxy; 5 to 7 and 9 are also in test_proxy.py
and test_streaming.py, where every side of them is tried.
"""

import json
import socket
import threading
import time
from contextlib import suppress

import httpx

from mllm_protector.prompts import REFUSAL
from tests.serving.fakes import (
    CUT,
    DONE,
    HTTP,
    SAFE,
    USAGE,
    USAGE_CHUNK,
    Asked,
    Said,
    Served,
    WordGuard,
    chunk,
    completion,
    message,
    served,
    stream,
)
from tests.serving.processes import until
from tests.serving.test_proxy import QUESTION, saying, to
from tests.serving.test_proxy import ask as ask_whole
from tests.serving.test_streaming import ask, ends, told, words

TEXT, END = chunk({"content": "fine"}), chunk({}, end="stop")


def test_01_line_separators_within_a_delta_cut_nothing() -> None:
    text = "one\u2028two\u2029three\x85four"
    whole = b"".join([chunk({"content": text}), END, DONE]).replace(b"\n", b"\r\n")
    for size in (1, 7, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        with served(saying(stream(*pieces)), to) as on:
            assert words(told(ask(on))) == text, size


def test_02_the_usage_of_the_upstream_is_unchanged_and_none_is_asked_for() -> None:
    for last in ([END, USAGE_CHUNK], [chunk({}, end="stop", usage=USAGE)]):
        with served(saying(stream(chunk({"content": "FORBIDDEN"}), *last, DONE)), to) as on:
            events = told(ask(on))
            assert [event["usage"] for event in events if event.get("usage")] == [USAGE]
            assert (events[-1]["usage"], words(events)) == (USAGE, SAFE)
            assert "stream_options" not in on.upstream.asked[0].body


def test_03_a_stream_may_end_without_done_if_its_choices_ended() -> None:
    for said in (stream(TEXT, END), stream(TEXT, END[:-2]), stream(TEXT, END.strip())):
        with served(saying(said), to) as on:
            events = told(ask(on))
            assert (words(events), ends(events)) == ("fine", ["stop"])


def test_04_a_replacement_says_why_it_ended_as_the_config_wants() -> None:
    for word, wanted, reason in (
        ("FORBIDDEN", "content_filter", "stop"),
        ("HOPELESS", "content_filter", "content_filter"),
        ("HOPELESS", "stop", "stop"),
    ):
        policy = {"refused_finish_reason": wanted}
        with served(saying(completion(message(word))), lambda url, p=policy: to(url, policy=p)) as on:
            assert ask_whole(on).json()["choices"][0]["finish_reason"] == reason


def test_05_no_later_choice_escapes() -> None:
    said = stream(TEXT, chunk({"content": "FORBIDDEN"}, index=1), END, chunk({}, index=1, end="stop"), DONE)
    with served(saying(said), to) as on:
        answer = ask(on)
        assert "FORBIDDEN" not in answer.text
        assert answer.headers["x-mllm-protector"] == "rewritten"


def test_06_a_tool_call_that_is_split_over_fragments_is_seen_whole() -> None:
    calls = [
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        for part in ('{"text": "FOR', "BID\\u0044", 'EN"}')
    ]
    with served(saying(stream(*calls, chunk({}, end="tool_calls"), DONE)), to) as on:
        events = told(ask(on))
        assert words(events) == REFUSAL
        assert "tool_calls" not in json.dumps(events)


def test_07_log_probabilities_do_not_tell_what_was_replaced() -> None:
    logprobs = {"content": [{"token": "FORBIDDEN", "logprob": -1.0, "top_logprobs": []}]}
    for word in ("FORBIDDEN", "fine"):
        choice = message(word) | {"logprobs": logprobs}
        with served(saying(completion(choice)), to) as on:
            kept = ask_whole(on).json()["choices"][0]["logprobs"]
            assert kept == (logprobs if word == "fine" else None)


def leave(on: Served, *, stream: bool, after: bytes) -> float:
    """Ask, leave when ``after`` came, and wait until the upstream notices; the seconds that took."""
    body = json.dumps({**QUESTION, "stream": stream}).encode()
    host, port = on.url.split("/")[2].split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert on.upstream.reached.wait(10)
        got = b""
        while after not in got:
            got += client.recv(4096)
    left = time.monotonic()
    assert on.upstream.gone.wait(10)
    return time.monotonic() - left


def test_08_the_upstream_is_told_when_the_client_leaves() -> None:
    silent, trickle = Said([30.0]), stream(TEXT, 30.0, END)
    for said, streamed, after, policy in (
        (silent, False, b"", {}),
        (silent, True, b"", {}),
        (trickle, True, b": ping", {"ping_s": 0.05}),
        (trickle, True, b"fine", {"streaming": "off"}),
        (Said([b"{", 30.0]), False, b"", {}),
    ):
        with served(saying(said), lambda url, p=policy: to(url, policy=p)) as on:
            assert leave(on, stream=streamed, after=after) < 5.0, (streamed, after)
            until(lambda: on.count("clients_gone_total") == 1)
            assert on.count("requests_under_way") == 0


def test_08_a_client_that_leaves_while_the_guard_works_harms_nobody() -> None:
    with served(saying(completion(message("fine"))), to, WordGuard(0.4)) as on:
        with suppress(httpx.TimeoutException):
            HTTP.post(f"{on.url}/v1/chat/completions", json=QUESTION, timeout=0.2)
        assert ask_whole(on).json()["choices"][0]["message"]["content"] == "fine"


def test_09_no_other_generating_route_is_open() -> None:
    with served(saying(completion(message("FORBIDDEN"))), to) as on:
        for name in (
            "responses",
            "messages",
            "completions",
            "embeddings",
            "audio/speech",
            "images/generations",
        ):
            assert HTTP.post(f"{on.url}/v1/{name}", json=QUESTION).status_code == 404
        assert not on.upstream.asked


def test_10_an_error_of_the_upstream_is_passed_on_if_nothing_was_sent() -> None:
    for status in (400, 402, 429, 500, 503):
        body = json.dumps({"error": {"message": "theirs", "code": status}}).encode()
        headers = {"content-type": "application/json", "retry-after": "7", "set-cookie": "a=b"}
        with served(saying(Said([body], status, headers)), to) as on:
            for answer in (ask_whole(on), ask(on)):
                assert (answer.status_code, answer.content) == (status, body)
                assert answer.headers["retry-after"] == "7"
                assert "set-cookie" not in answer.headers
            assert on.count("upstream_errors_total", kind=f"status_{status // 100}xx") == 2


def test_10_an_error_behind_the_first_byte_is_one_frame_and_done() -> None:
    late = Said([0.3, b'{"error": {"message": "theirs"}}'], 500)
    within = stream(TEXT, 0.3, b'data: {"error": {"message": "theirs"}}\n\n')
    for said in (late, within):
        with served(saying(said), lambda url: to(url, policy={"ping_s": 0.05})) as on:
            answer = ask(on)
            assert answer.status_code == 200
            assert told(answer) == [{"error": {"message": "theirs"}}]
    with served(saying(within), to) as on:
        answer = ask(on)
        assert (answer.status_code, answer.json()) == (502, {"error": {"message": "theirs"}})
    cut = stream(TEXT, CUT)
    with served(saying(cut), lambda url: to(url, policy={"streaming": "off"})) as on:
        events = told(ask(on))
        assert (len(events), events[-1]["error"]["code"]) == (2, "upstream_cut")


def test_10_a_stream_that_is_cut_is_an_error_and_nothing_of_it_is_released() -> None:
    for said, code in (
        (stream(TEXT, CUT), "upstream_cut"),
        (stream(TEXT), "upstream_cut"),
        (stream(TEXT, TEXT[:20]), "upstream_malformed"),
        (stream(DONE), "upstream_cut"),
        (stream(b"data: {\n\n"), "upstream_malformed"),
        (stream(b"data: [1]\n\n"), "upstream_malformed"),
        (stream(), "upstream_cut"),
    ):
        with served(saying(said), to) as on:
            answer = ask(on)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, code)
            assert "fine" not in answer.text


def test_10_an_answer_that_makes_no_sense_is_an_error() -> None:
    for said in (
        Said([b"{"]),
        Said([b"[]"]),
        Said([b""], 204),
        Said([b"{}"]),
        Said([b'{"choices": [], "error": null}']),
        Said([b'{"choices": [{"text": "FORBIDDEN"}]}']),
        Said([b'{"choices": [{}, 3]}']),
        Said([b'{"error": {"message": "theirs"}}']),
        Said([b'{"choices": "FORBIDDEN"}'], 400),
        Said([b""], 302, {"location": "http://127.0.0.1:9/"}),
        Said([b'{"cho', CUT]),
    ):
        with served(saying(said), to) as on:
            answer = ask_whole(on)
            assert answer.status_code in (400, 502), said
            assert "error" in answer.json()
            assert "FORBIDDEN" not in answer.text


def test_10_an_upstream_that_is_not_there_or_silent_is_told_apart() -> None:
    with served(saying(stream()), lambda url: to("http://127.0.0.1:9/v1")) as on:
        answer = ask_whole(on)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
    trickle = stream(*([0.1, b": x\n\n"] * 50))
    for said, times in ((Said([5.0]), {"read_s": 0.2}), (trickle, {"total_s": 0.5})):
        with served(saying(said), lambda url, t=times: to(url, upstream=t)) as on:
            answer = ask(on)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")


def test_11_a_slow_trickle_is_held_with_comments() -> None:
    letters = [piece for letter in "trickle" for piece in (0.1, chunk({"content": letter}))]
    said = stream(*letters, END, DONE)
    with served(saying(said), lambda url: to(url, policy={"ping_s": 0.02})) as on:
        answer = ask(on)
        assert answer.text.count(": ping") >= 3
        assert words(told(answer)) == "trickle"
        assert answer.headers["x-accel-buffering"] == "no"


def test_12_bytes_without_a_verdict_are_counted_and_none_in_held_streams() -> None:
    said = stream(chunk({"content": "FORBIDDEN"}), END, DONE)
    for streaming, none in (("buffer", True), ("off", False)):
        with served(saying(said), lambda url, s=streaming: to(url, policy={"streaming": s})) as on:
            answer = ask(on)
            assert (on.count("unscanned_bytes_total") == 0) == none
            assert ("FORBIDDEN" in answer.text) != none


def test_a_huge_answer_is_an_error_and_memory_stays() -> None:
    huge = [b"data: " + b"x" * 100_000 + b"\n\n"] * 30
    for said in (stream(*huge), Said(huge)):
        with served(saying(said), lambda url: to(url, limits={"answer_mb": 1})) as on:
            answer = ask(on) if said.headers["content-type"] == "text/event-stream" else ask_whole(on)
            assert answer.status_code == 502


def test_concurrent_answers_are_not_swapped() -> None:
    def echo(asked: Asked) -> Said:
        name = asked.body["messages"][0]["content"]
        return stream(chunk({"content": name}), 0.05, END, DONE)

    with served(echo, to, WordGuard(0.02)) as on:
        got: dict[str, str] = {}

        def one(name: str) -> None:
            body = {"stream": True, "messages": [{"role": "user", "content": name}]}
            answer = HTTP.post(f"{on.url}/v1/chat/completions", json=body, timeout=60)
            got[name] = words(told(answer))

        threads = [threading.Thread(target=one, args=(f"name {each}",)) for each in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {name: name for name in got}
        assert len(got) == 20
