"""The routes of a front, with a guard that goes by words."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from mllm_protector.errors import InputError
from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.proxy import Front
from mllm_protector.serving.settings import ApiKey, FrontSettings
from tests.serving.builders import front_settings, limit_settings, policy_settings, upstream_settings
from tests.serving.fakes import HTTP, SAFE, USAGE, Asked, Said, Served, WordGuard, completion, message, served
from tests.serving.stubs import PATIENCE

CANARY = "CANARY-7f3a"
DETAILS = {"x-mllm-protector-details": "1"}
QUESTION = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}


def to(url: str, **changes: Any) -> FrontSettings:
    upstream = changes.pop("upstream", {})
    policy = policy_settings(**changes.pop("policy", {}))
    limits = limit_settings(**changes.pop("limits", {}))
    return front_settings(
        upstream=upstream_settings(**{"url": url} | upstream), policy=policy, limits=limits, **changes
    )


def saying(said: Said) -> Callable[[Asked], Said]:
    return lambda asked: said


def ask(on: Served, body: Any = QUESTION, **headers: str) -> httpx.Response:
    return HTTP.post(f"{on.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_each_choice_is_judged_on_its_own_and_put_back_by_its_outcome() -> None:
    raw = [message("Because."), message("FORBIDDEN", 1), message("HOPELESS", 2), message("Ah.", 3)]
    for choice in raw:
        choice["logprobs"] = {"content": [{"token": choice["message"]["content"]}]}
    with served(saying(completion(*raw)), to) as on:
        answer = ask(on, {**QUESTION, "n": 4}, **DETAILS)
        assert answer.headers["x-mllm-protector"] == "refused"
        body = answer.json()
        first, second, third, fourth = body["choices"]
        assert (first, fourth) == (raw[0], raw[3])
        assert second["message"]["content"] == SAFE
        assert (second["finish_reason"], second["logprobs"]) == ("stop", None)
        assert third["message"]["content"] == REFUSAL
        assert third["finish_reason"] == "content_filter"
        assert body["usage"] == USAGE
        scores = [each["score"] for each in body["mllm_protector"]["choices"]]
        assert scores == [0.1, 0.9, 0.95, 0.1]
        assert "FORBIDDEN" not in answer.text
        assert on.guard.asked[0] == ("Why?", "Because.", None)
        assert on.count("outcomes_total", outcome="rewritten", mode="enforce") == 1
        assert on.count("unscanned_bytes_total") == 0 < on.count("released_bytes_total")
        assert "mllm_protector" not in ask(on, {**QUESTION, "n": 4}).json()


def test_a_flagged_tool_call_is_refused_and_its_words_never_rewritten() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":"\\u0046ORBIDDEN"}'}}
    for arguments, outcome in ((call, "refused"), ({**call, "function": {"name": "f"}}, "allowed")):
        with served(saying(completion(message(None, tool_calls=[arguments]))), to) as on:
            answer = ask(on)
            assert answer.headers["x-mllm-protector"] == outcome
            assert ("tool_calls" in answer.json()["choices"][0]["message"]) == (outcome == "allowed")


def test_words_beside_the_content_do_not_escape() -> None:
    for name in ("reasoning_content", "reasoning", "refusal"):
        with served(saying(completion(message("fine", **{name: "FORBIDDEN"}))), to) as on:
            answer = ask(on)
            assert answer.headers["x-mllm-protector"] == "rewritten", name
            assert "FORBIDDEN" not in answer.text
    with served(saying(completion(message("fine", other="FORBIDDEN"), verbose="FORBIDDEN")), to) as on:
        assert "FORBIDDEN" not in ask(on).text


def test_a_guard_that_fails_gives_a_refusal_or_an_error_by_config() -> None:
    for word in ("DOWN", "BUG"):
        with served(saying(completion(message(word))), to) as on:
            answer = ask(on)
            assert answer.headers["x-mllm-protector"] == "guard_error"
            assert answer.json()["choices"][0]["message"]["content"] == REFUSAL
        with served(
            saying(completion(message(word))), lambda url: to(url, policy={"on_error": "error"})
        ) as on:
            answer = ask(on)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "guard_unavailable"
    with served(saying(completion(message("BUSY"), message("fine", 1))), to) as on:
        answer = ask(on)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


def test_an_answer_that_cannot_be_judged_is_refused() -> None:
    with served(saying(completion(message([{"type": "image_url", "image_url": "x"}]))), to) as on:
        assert ask(on).headers["x-mllm-protector"] == "guard_error"


def test_shadow_mode_changes_nothing_and_counts_what_would_have_happened() -> None:
    said = completion(message("FORBIDDEN", other="kept"), message("DOWN", 1))
    with served(saying(said), lambda url: to(url, policy={"shadow": True})) as on:
        answer = ask(on)
        assert answer.headers["x-mllm-protector"] == "shadow-guard_error"
        assert answer.content == said.pieces[0]
        assert on.count("outcomes_total", outcome="rewritten", mode="shadow") == 1
        assert on.count("unscanned_bytes_total") == len(answer.content)


def test_every_route_that_is_not_guarded_is_denied_by_name() -> None:
    with served(saying(completion(message("fine"))), to) as on:
        for path in (
            "completions",
            "responses",
            "messages",
            "embeddings",
            "chat/completions/",
            "../x",
            "%2e%2e",
        ):
            answer = HTTP.post(f"{on.url}/v1/{path}", json=QUESTION)
            assert answer.status_code == 404, path
            assert answer.json()["error"]["code"] == "route_not_guarded"
            assert "POST /v1/chat/completions" in answer.json()["error"]["message"]
        assert "/v1/responses" in HTTP.post(f"{on.url}/v1/responses").json()["error"]["message"]
        assert HTTP.get(f"{on.url}/v1/chat/completions").status_code == 405
        assert HTTP.post(f"{on.url}/v1/models").headers["allow"] == "GET"
        assert not on.upstream.asked


def test_path_query_and_most_headers_stay_here() -> None:
    given = {"authorization": "Bearer client", "x-forwarded-for": "1.2.3.4", "cookie": "a=b", "te": "x"}
    with served(saying(completion(message("fine"))), to) as on:
        path = "/v1/chat/completions?url=http://example.invalid/&a=%2e%2e"
        assert HTTP.post(on.url + path, json=QUESTION, headers=given).status_code == 200
        [asked] = on.upstream.asked
        assert asked.path == "/v1/chat/completions"
        assert asked.headers["authorization"] == "Bearer client"
        assert asked.headers["host"] == on.upstream.url.split("/")[2]
        assert not {"x-forwarded-for", "cookie", "te"} & asked.headers.keys()


def test_models_pass_and_health_ready_and_metrics_answer() -> None:
    with served(saying(Said([b'{"data": []}'])), to) as on:
        assert HTTP.get(f"{on.url}/v1/models?x=1").json() == {"data": []}
        assert on.upstream.asked[-1].path == "/v1/models"
        assert HTTP.get(f"{on.url}/health").status_code == 200
        assert HTTP.get(f"{on.url}/ready").json() == {"guard": True, "upstream": True}
        on.guard.ready = False
        assert HTTP.get(f"{on.url}/ready").status_code == 503
        assert "mllm_protector_guard_ready 0.0" in HTTP.get(f"{on.url}/metrics").text
    with served(saying(Said([])), lambda url: to("http://127.0.0.1:9/v1")) as on:
        assert HTTP.get(f"{on.url}/ready").json() == {"guard": True, "upstream": False}
    for status, reached in ((500, True), (503, False)):
        with served(saying(Said([], status)), to) as on:
            assert HTTP.get(f"{on.url}/ready").json() == {"guard": True, "upstream": reached}, status


def test_with_keys_only_their_owners_are_let_in_and_the_upstream_gets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "own")
    key = ApiKey(name="ann", sha256=hashlib.sha256(b"secret").hexdigest())
    policy = {"key_thresholds": {"ann": 0.3}, "model_thresholds": {"m": 0.7}}

    def settings(url: str) -> FrontSettings:
        return to(url, keys=[key], policy=policy, upstream={"api_key_env": "UPSTREAM_KEY"})

    with served(saying(completion(message("fine"))), settings) as on:
        for wrong in ({}, {"authorization": "Bearer Secret"}, {"authorization": "Basic secret"}):
            answer = ask(on, **wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert HTTP.get(f"{on.url}/v1/models").status_code == 401
        assert not on.upstream.asked
        assert ask(on, authorization="Bearer secret").status_code == 200
        assert on.upstream.asked[0].headers["authorization"] == "Bearer own"
        assert on.guard.asked[0][2] == 0.3
    with served(saying(completion(message("fine"))), lambda url: to(url, keys=[key])) as on:
        ask(on, authorization="Bearer secret")
        assert "authorization" not in on.upstream.asked[0].headers


def test_a_request_is_limited_before_the_upstream_is_asked() -> None:
    kind = {"content-type": "application/json"}
    limits = {"body_mb": 0.01, "requests": 1}
    with served(saying(completion(message("fine"))), lambda url: to(url, limits=limits)) as on:
        path = f"{on.url}/v1/chat/completions"
        big = json.dumps({**QUESTION, "x": "a" * 20_000}).encode()
        assert HTTP.post(path, content=big, headers=kind).status_code == 413
        assert HTTP.post(path, content=iter([big]), headers=kind).status_code == 413
        assert HTTP.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        zipped = HTTP.post(path, content=b"{}", headers=kind | {"content-encoding": "gzip"})
        assert zipped.status_code == 415
        assert not on.upstream.asked
    limits = {"body_s": 0.3}
    with served(saying(completion(message("fine"))), lambda url: to(url, limits=limits)) as on:

        def slowly() -> Any:
            yield b"{"
            late.wait(3)
            yield b"}"

        late = threading.Event()
        path = f"{on.url}/v1/chat/completions"
        assert HTTP.post(path, content=slowly(), headers=kind).status_code == 408
        late.set()
        assert not on.upstream.asked


def test_too_many_requests_at_once_are_told_to_come_again() -> None:
    told = threading.Event()
    said = Said([b"{", lambda: told.wait(PATIENCE)])
    with served(saying(said), lambda url: to(url, limits={"requests": 1})) as on:
        first = threading.Thread(target=ask, args=(on,))
        first.start()
        assert on.upstream.reached.wait(10)
        answer = ask(on)
        told.set()
        first.join()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_no_text_gets_into_logs_or_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mllm_protector")
    for word in ("fine", "FORBIDDEN", "DOWN", "BUG", "BUSY"):
        with served(saying(completion(message(f"{word} {CANARY}"))), to) as on:
            question = {"model": CANARY, "messages": [{"role": "user", "content": CANARY}], "user": CANARY}
            ask(on, question)
            ask(on, {**question, "n": CANARY})
            HTTP.post(f"{on.url}/v1/{CANARY}?q={CANARY}")
            assert CANARY not in HTTP.get(f"{on.url}/metrics").text, word
    assert caplog.text
    assert CANARY not in caplog.text


def test_what_is_not_there_is_said_at_the_start() -> None:
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        Front(to("http://127.0.0.1:9/v1", upstream={"api_key_env": "NO_SUCH_KEY"}), WordGuard())
