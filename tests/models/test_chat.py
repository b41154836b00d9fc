import asyncio
import gzip
import json
import logging
import socket
import threading
import time
from typing import Any

import pytest

from mllm_protector.calls import check_call
from mllm_protector.errors import InputError, RunError
from mllm_protector.models.chat import ServedChat
from mllm_protector.records import CutText, Failure
from tests import servers
from tests.cases import case
from tests.servers import Reply, Request, ScriptedServer

CANARY = "sk-canary-4711-never-shown"
FAULTS = {
    "bad request": (servers.failed(400), "the server failed (HTTP 400)"),
    "unprocessable": (servers.failed(422), "the server failed (HTTP 422)"),
    "server error": (servers.failed(500), "the server failed (HTTP 500)"),
    "overloaded": (servers.failed(503), "the server failed (HTTP 503)"),
    "too many": (servers.too_many(), "the server failed (HTTP 429)"),
    "reset": (servers.reset(), "the connection broke"),
    "cut JSON": (servers.cut_json(), "the request or its reply is not valid JSON"),
    "empty body": (servers.empty_body(), "the request or its reply is not valid JSON"),
    "no JSON": (
        Reply(body=b"<html>", headers={"Content-Type": "text/html"}),
        "the reply is not a chat completion",
    ),
    "null": (Reply(body=b"null"), "the reply is not a chat completion"),
    "a list": (Reply(body=b"[1]"), "the reply is not a chat completion"),
    "deep": (Reply(body=b"[" * 100_000), "the request or its reply is not valid JSON"),
    "no choices": (servers.no_choices(), "the reply is not a chat completion"),
    "choices null": (servers.completion(None), "the reply is not a chat completion"),
    "choice of no kind": (servers.completion(["x"]), "the reply is not a chat completion"),
    "error in a 200": (Reply(body=b'{"error": {"code": 502}}'), "the reply is not a chat completion"),
    "no content": (servers.no_content(), "the reply holds no text"),
}


def chat(server: ScriptedServer | str, **settings: Any) -> ServedChat:
    url = server if isinstance(server, str) else server.base_url
    defaults = {"concurrency": 4, "timeout": 30.0, "max_retries": 1, "temperature": 0.0}
    return ServedChat(**{"model": "m", "base_url": url} | defaults | settings)


def say(*words: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": word}] for word in words]


@pytest.fixture(autouse=True)
def no_key_and_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_replies_come_in_the_order_of_the_conversations_whatever_comes_first() -> None:
    words = [str(index) for index in range(12)]

    def later_ones_first(request: Request) -> Reply:
        return servers.slow((12 - int(request.text)) / 100, f" reply {request.text}\n")

    with ScriptedServer(later_ones_first) as server:
        replies = chat(server, concurrency=12).complete(say(*words), max_tokens=7)
    assert replies == [f"reply {word}" for word in words]


def test_a_request_says_what_the_settings_say() -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "https://example.com/a.png"},
    ]
    with ScriptedServer(["fine"]) as server:
        chat(server, temperature=0.5, seed=3).complete([turns], max_tokens=7)
        chat(server, temperature=None, length_field="max_completion_tokens").complete([turns], max_tokens=7)
        chat(server, temperature=1.0, seed=3).complete([turns, turns], max_tokens=7, seeds=[5, None])
    bodies = [request.body for request in server.requests]
    assert bodies[0] == {"model": "m", "messages": turns, "max_tokens": 7, "temperature": 0.5, "seed": 3}
    assert bodies[1] == {"model": "m", "messages": turns, "max_completion_tokens": 7}
    assert sorted(body.get("seed", 0) for body in bodies[2:]) == [0, 5]


def test_a_row_that_goes_wrong_fails_alone_and_in_fixed_words() -> None:
    with ScriptedServer(
        lambda request: FAULTS[request.text][0] if request.text in FAULTS else "re"
    ) as server:
        replies = chat(server).complete(say("a", *FAULTS, "half \ud800 pair", "b"), max_tokens=7)
    reasons = [*(reason for _, reason in FAULTS.values()), "the request or its reply is not valid JSON"]
    failures = [Failure(reason=f"{reason} at {server.base_url}") for reason in reasons]
    assert replies == ["re", *failures, "re"]


def test_the_time_limit_is_for_the_whole_request_however_the_bytes_come() -> None:
    for slow in (servers.silent(), servers.trickle(0.05), servers.slow(5)):
        started = time.monotonic()
        with ScriptedServer([slow]) as server:
            replies = chat(server, timeout=0.6, max_retries=1).complete(say("a"), max_tokens=7)
        assert replies == [Failure(reason=f"no whole reply within timeout=0.6 s at {server.base_url}")], slow
        assert server.count == 2, slow
        assert time.monotonic() - started < 10, slow


def test_a_compressed_reply_counts_as_it_is_unpacked() -> None:
    for size, failed in ((20_000_000, True), (1_000, False)):
        words = servers.text("x" * size)
        packed = Reply(body=gzip.compress(words.body), headers={"Content-Encoding": "gzip"})
        with ScriptedServer([packed]) as server:
            [reply] = chat(server).complete(say("a"), max_tokens=7)
        assert isinstance(reply, Failure) == failed, size


def test_replies_can_be_asked_for_within_an_event_loop() -> None:
    async def notebook(address: str) -> list[str | Failure]:
        return chat(address).complete(say("a"), max_tokens=7)

    with ScriptedServer(["fine"]) as server:
        assert asyncio.run(notebook(server.base_url)) == ["fine"]


def test_halves_of_surrogate_pairs_are_replaced_where_they_enter() -> None:
    body = servers.text("half HERE and \U0001f600 whole").body.replace(b"HERE", b"\\ud83d")
    with ScriptedServer([Reply(body=body)]) as server:
        assert chat(server).complete(say("a"), max_tokens=7) == ["half \ufffd and \U0001f600 whole"]


def test_what_a_content_filter_or_the_model_declines_is_marked_as_refused() -> None:
    for reply in [
        servers.refusal(),
        servers.content_filter(),
        servers.text("partly", finish="content_filter"),
        servers.failed(400, code="content_filter"),
        servers.failed(400, code="invalid_prompt"),
        Reply(status=403, body=b'{"error": {"code": 403, "metadata": {"flagged_input": "..."}}}'),
        Reply(
            status=400,
            body=b'{"error": {"code": "400", "provider_specific_fields": '
            b'{"innererror": {"code": "ResponsibleAIPolicyViolation"}}}}',
        ),
    ]:
        with case(reply):
            with ScriptedServer([reply]) as server:
                [failure] = chat(server).complete(say("a"), max_tokens=7)
            assert isinstance(failure, Failure)
            assert failure.refused
            assert not failure.unreachable
            assert server.count == 1


def test_a_cut_an_empty_or_a_foreign_reply_is_a_reply() -> None:
    for reply in [
        servers.text("cut here", finish="length"),
        servers.text("", finish="stop"),
        servers.wrong_language(),
    ]:
        with case(reply):
            with ScriptedServer([reply]) as server:
                [answer] = chat(server).complete(say("a"), max_tokens=7)
            [choice] = json.loads(reply.body)["choices"]
            assert answer == choice["message"]["content"]
            assert isinstance(answer, CutText) == (choice["finish_reason"] == "length")


PASSING = {str(status): servers.failed(status) for status in (408, 409, 429, 500, 502, 503, 529)}
PASSING["reset"] = servers.reset()


def test_passing_faults_are_repeated() -> None:
    def twice(request: Request) -> Reply | str:
        return PASSING[request.text] if request.attempt < 2 else "fine"

    with ScriptedServer(twice) as server:
        assert chat(server, max_retries=2).complete(say(*PASSING), max_tokens=7) == ["fine"] * len(PASSING)


def test_requests_are_repeated_no_more_often_than_allowed_and_only_where_it_may_help() -> None:
    for reply, reason, count in (
        (servers.failed(500), "the server failed (HTTP 500)", 4),
        (servers.failed(400), "the server failed (HTTP 400)", 1),
        (servers.too_many(retry_after=3600), "the server failed (HTTP 429)", 1),
        (servers.endless(), "the reply is larger than 16 MB", 1),
    ):
        with case(reason, count), ScriptedServer([reply]) as server:
            [failure] = chat(server, timeout=20, max_retries=3).complete(say("a"), max_tokens=7)
            assert failure == Failure(reason=f"{reason} at {server.base_url}")
            assert server.count == count


def test_the_next_try_waits_as_long_as_the_server_asks() -> None:
    with ScriptedServer([servers.too_many(retry_after=0.6), "fine"]) as server:
        assert chat(server).complete(say("a"), max_tokens=7) == ["fine"]
    waited = server.requests[1].at - server.requests[0].at
    assert 0.6 <= waited < 6


def test_no_more_requests_are_under_way_than_allowed() -> None:
    def together(request: Request) -> Reply:
        """Nothing is answered before as many are under way as may be."""
        if server.busiest >= concurrency:
            full.set()
        assert full.wait(20)
        return servers.slow(0.05)

    for concurrency in [1, 3]:
        full = threading.Event()
        with case(concurrency):
            with ScriptedServer(together) as server:
                chat(server, concurrency=concurrency).complete(say(*"abcdefghi"), max_tokens=7)
            assert server.busiest == concurrency


def test_where_nobody_answers_every_row_says_so_and_waiting_rows_are_not_tried(closed: str) -> None:
    started = time.monotonic()
    replies = chat(closed, concurrency=2, max_retries=2).complete(say(*"abcdefgh" * 200), max_tokens=7)
    assert {type(reply) for reply in replies} == {Failure}
    assert all(reply.unreachable and not reply.refused for reply in replies)
    assert time.monotonic() - started < 10  # minutes if each were tried


def test_a_server_that_goes_away_in_the_middle_leaves_what_it_answered() -> None:
    def close_at_the_fourth(request: Request) -> str | Reply:
        if request.index == 3:
            server.close()  # or it could answer the next try
            return servers.reset()
        return "fine"

    with ScriptedServer(close_at_the_fourth) as server:
        replies = chat(server, concurrency=1, max_retries=3).complete(say(*"abcdefgh"), max_tokens=7)
    assert replies[:3] == ["fine"] * 3
    assert all(isinstance(reply, Failure) and reply.unreachable for reply in replies[3:])


def test_what_no_row_would_survive_stops_at_once_in_one_line() -> None:
    for reply, kind, words in [
        (servers.failed(401), InputError, "does not accept the key (HTTP 401)"),
        (servers.failed(403), InputError, "does not let the key use it (HTTP 403)"),
        (servers.failed(404), InputError, "does not know the model or the address (HTTP 404)"),
        (servers.failed(402), RunError, "says that no credit is left (HTTP 402)"),
        (servers.failed(429, code="insufficient_quota"), RunError, "no credit is left (HTTP 429)"),
    ]:
        with case(reply, kind, words):
            with ScriptedServer([reply]) as server:
                model = chat(server, max_retries=0, api_key_env="SOME_KEY")
                with pytest.raises(kind) as stopped:
                    model.complete(say(*map(str, range(300))), max_tokens=7)
            message = str(stopped.value)
            assert type(stopped.value) is kind
            assert words in message
            assert "\n" not in message
            for named in ("model=m", server.base_url, "SOME_KEY"):
                assert named in message
            assert server.count <= 4


def test_a_missing_key_is_named_and_loopback_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"api_key_env=OPENAI_API_KEY: this environment variable is not set"):
        chat("https://example.com/v1")
    with pytest.raises(InputError, match=r"api_key_env=OTHER: "):
        chat("https://example.com/v1", api_key_env="OTHER")
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ServedChat(model="m", concurrency=1, timeout=1, max_retries=0, temperature=0)
    for url in ("http://localhost:1/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        chat(url)
    chat("http://node7:8000/v1", api_key_env=None)
    monkeypatch.setenv("OTHER", "schlüssel")
    with pytest.raises(InputError, match="is not a key") as refused:
        chat("https://example.com/v1", api_key_env="OTHER")
    assert "schl" not in str(refused.value)


def test_an_address_with_a_secret_or_that_is_none_is_refused_unseen() -> None:
    for address in [
        "http://user:pass-canary@127.0.0.1/v1",
        "http://pass-canary@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=pass-canary",
        "http://127.0.0.1/v1#pass-canary",
        "http://user:pass-canary@127.0.0.1:port/v1",
        "127.0.0.1:8000/pass-canary",
        "file:///pass-canary",
        "http://",
    ]:
        with case(address):
            with pytest.raises(InputError, match=r"^base_url: ") as refused:
                chat(address)
            assert "canary" not in str(refused.value)


def test_a_number_out_of_range_is_named() -> None:
    for settings, message in [
        ({"concurrency": 0}, "concurrency=0: must be at least 1"),
        ({"max_retries": -1}, "max_retries=-1: must be at least 0"),
        ({"timeout": 0.0}, "timeout=0.0: must be at least 1e-09"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
    ]:
        given = {"model": "m", "concurrency": 1, "timeout": 1, "max_retries": 0, "temperature": 0} | settings
        with case(settings, message), pytest.raises(InputError, match=message):
            check_call("", ServedChat, given)


def test_the_key_is_in_the_header_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: str
) -> None:
    monkeypatch.setenv("SOME_KEY", f" {CANARY}\n")
    caplog.set_level(logging.DEBUG)
    script = [
        servers.too_many(retry_after=0.01), "fine", servers.cut_json(), servers.failed(400),
        servers.reset(), servers.reset(), servers.failed(401),
    ]  # fmt: skip
    seen: list[Any] = []
    with ScriptedServer(script) as server:
        model = chat(server, api_key_env="SOME_KEY")
        seen += [model.card.identity, vars(model), repr(model)]
        seen += [model.complete(say("a"), max_tokens=7) for _ in range(4)]
        with pytest.raises(InputError) as stopped:
            model.complete(say("a"), max_tokens=7)
    seen += [stopped.value, chat(closed, api_key_env="SOME_KEY").complete(say("a"), max_tokens=7)]
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {CANARY}"}
    assert server.count == len(script)
    assert "POST" in caplog.text
    assert CANARY not in caplog.text
    assert all(CANARY not in str(what) for what in seen)


def test_the_identity_holds_what_replies_depend_on_with_host_port_and_path() -> None:
    settings = {"temperature": 0.5, "seed": 3, "concurrency": 2, "timeout": 9, "max_retries": 7}
    for address, shown in (
        ("http://127.0.0.1:8123/v1/", "http://127.0.0.1:8123/v1"),
        ("http://LocalHost:80/v1", "http://localhost/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ):
        expected = {"model": "m", "base_url": shown, "temperature": 0.5, "seed": 3}
        found = chat(address, **settings).card.identity
        assert found == expected
        assert json.loads(json.dumps(found)) == expected


def test_two_addresses_with_one_name_are_one_model() -> None:
    first, second = (
        chat(f"http://127.0.0.1:{port}/v1", identity="our model").card.identity for port in (8000, 8001)
    )
    assert first == second == {"model": "m", "identity": "our model", "temperature": 0.0, "seed": None}
    assert first != chat("http://127.0.0.1:8000/v1", identity="another").card.identity
    whole = chat("http://127.0.0.1:8000/v1", identity="our model", temperature=0).card.identity
    assert json.dumps(whole) == json.dumps(first)
