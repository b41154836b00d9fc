"""LiteLLM's Generic Guardrail API, as its code reads replies."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.gateways.litellm import BLOCKED, UNREAD
from tests.serving.fakes import HTTP, SAFE, Served
from tests.serving.gateways.paths import KEYS, guarded, post
from tests.serving.processes import until

PATH = "/beta/litellm_basic_guardrail_api"
DOCS = Path(__file__).parents[3] / "docs/serving.md"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\u0046ORBIDDEN"}'}}


@pytest.fixture
def on() -> Iterator[Served]:
    with guarded(answer_only_threshold=0.3, threshold=0.6) as front:
        yield front


def asked(on: Served, **body: Any) -> dict[str, Any]:
    answer = post(on, PATH, {"request_data": {}, **body})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def response(on: Served, *texts: str, **body: Any) -> dict[str, Any]:
    return asked(on, input_type="response", texts=[*texts], **body)


def test_flagged_texts_are_replaced_in_their_places(on: Served) -> None:
    reply = response(on, "fine", "FORBIDDEN", "HOPELESS", "")
    assert reply["action"] == "GUARDRAIL_INTERVENED"
    assert reply["texts"] == ["fine", SAFE, REFUSAL, ""]
    assert reply["stream_holdback_chars"] == [len(text) for text in reply["texts"]]
    assert response(on, "fine") == {"action": "NONE", "stream_holdback_chars": [4]}
    assert response(on)["action"] == "NONE"
    assert on.count("outcomes_total", outcome="rewritten", mode="enforce") == 1
    until(lambda: on.count("requests_total", route=PATH, status="200") == 3)  # counted behind the reply


def test_an_answer_is_judged_with_the_question_of_its_call(on: Served) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]
    first = asked(
        on, input_type="request", litellm_call_id="c", texts=["s", "Why?"], structured_messages=turns
    )
    assert first == {"action": "NONE"}
    asked(on, input_type="request", litellm_call_id="d", texts=["One", "two"])
    assert on.guard.asked == []
    for call in ("c", "c", "d", "unknown", None):
        response(on, "fine", litellm_call_id=call)
    questions = [(query, threshold) for query, _, threshold in on.guard.asked]
    assert questions == [("Why?", 0.6), ("Why?", 0.6), ("One\ntwo", 0.6), ("", 0.3), ("", 0.3)]


def test_of_two_questions_with_one_id_neither_is_believed(on: Served) -> None:
    for text in ("harmless", "other", "harmless"):
        asked(on, input_type="request", litellm_call_id="c", texts=[text])
    response(on, "fine", litellm_call_id="c")
    assert on.guard.asked[0][::2] == ("", 0.3)


def test_a_flagged_tool_call_or_an_image_blocks_the_answer(on: Served) -> None:
    blocked = {"action": "BLOCKED", "blocked_reason": BLOCKED}
    assert response(on, "fine", tool_calls=[CALL]) == blocked
    harmless = {**CALL, "function": {"name": "f", "arguments": "{}"}}
    assert response(on, "fine", tool_calls=[harmless])["action"] == "NONE"
    assert response(on, "fine", images=["data:,"]) == {"action": "BLOCKED", "blocked_reason": UNREAD}


def test_the_gateway_may_want_flagged_answers_blocked(on: Served) -> None:
    for text, action in (("FORBIDDEN", "BLOCKED"), ("fine", "NONE")):
        reply = response(on, text, additional_provider_specific_params={"on_flag": "block"})
        assert reply["action"] == action
        assert "texts" not in reply


def test_without_a_verdict_the_gateway_gets_an_error() -> None:
    for word, wait in (("DOWN", "1"), ("BUG", "1"), ("BUSY", "3")):
        with guarded(on_error="refuse") as on:
            answer = post(on, PATH, {"input_type": "response", "texts": ["fine", word]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, wait), word


def test_no_text_gets_into_logs_or_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="mllm_protector")
    with guarded() as on:
        for word in ("BUG", "DOWN", "FORBIDDEN", "fine"):
            for kind in ("request", "response"):
                texts = [f"{word} CANARY-7f3a"]
                post(on, PATH, {"input_type": kind, "texts": texts, "litellm_call_id": "CANARY-7f3a"})
        shown = HTTP.get(f"{on.url}/metrics").text
    assert "the guard failed" in caplog.text
    assert "CANARY" not in caplog.text + shown


def test_shadow_mode_only_counts() -> None:
    with guarded(shadow=True) as on:
        for text in ("FORBIDDEN", "DOWN", "BUSY"):
            assert response(on, text, tool_calls=[CALL], images=["data:,"])["action"] == "NONE"
        assert on.count("outcomes_total", outcome="refused", mode="shadow") == 3
        assert on.count("outcomes_total", outcome="guard_error", mode="shadow") == 2


def test_what_cannot_be_read_is_an_error(on: Served) -> None:
    for body in (
        {},
        {"input_type": "other"},
        {"input_type": "response", "texts": "FORBIDDEN"},
        {"input_type": "response", "texts": [1]},
        {"input_type": "response", "texts": ["a"] * 513},
        {"input_type": "response", "tool_calls": "x"},
        {"input_type": "response", "model": 1},
        {"input_type": "request", "litellm_call_id": 7},
        {"input_type": "request", "litellm_call_id": "x" * 257},
        {"input_type": "request", "litellm_call_id": "x", "texts": 1},
        {"input_type": "response", "additional_provider_specific_params": {"on_flag": "pass"}},
    ):
        assert post(on, PATH, body).status_code == 400, body
    assert on.guard.asked == []


def test_keys_come_in_either_header_and_questions_are_their_own() -> None:
    with guarded(keys=KEYS) as on:
        request = {"input_type": "request", "litellm_call_id": "c", "texts": ["Why?"]}
        answer = {"input_type": "response", "litellm_call_id": "c", "texts": ["fine"]}
        assert post(on, PATH, request, **{"x-api-key": "one"}).status_code == 200
        assert post(on, PATH, answer, authorization="Bearer one").status_code == 200
        assert post(on, PATH, answer, authorization="Bearer two").status_code == 200
        assert [query for query, _, _ in on.guard.asked] == ["Why?", ""]
        assert post(on, PATH, answer).status_code == 401
        assert post(on, PATH, answer, **{"x-api-key": "three"}).status_code == 401


def test_the_configuration_in_the_documentation_is_the_one_that_is_tested() -> None:
    section = DOCS.read_text().partition("## LiteLLM")[2]
    documented = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    tested = yaml.safe_load((Path(__file__).parent / "litellm.yaml").read_text())
    [guard] = documented["guardrails"]
    assert guard["litellm_params"].pop("default_on") is True  # the tests choose by request
    assert guard == tested["guardrails"][0]
    assert documented["model_list"] == tested["model_list"][:1]
