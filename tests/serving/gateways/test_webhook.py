"""The guardrail webhook: replies by the published schema (Gloo AI Gateway, Guardrail Webhook API 0.1.0)."""

from typing import Any

from mllm_protector.prompts import REFUSAL
from tests.serving.fakes import SAFE
from tests.serving.gateways.paths import guarded, post


def choices(*texts: str) -> dict[str, Any]:
    return {"body": {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]}}


def read(reply: dict[str, Any]) -> list[str] | None:
    """The texts that a gateway would put in place; ``None`` if it passes. It tries the actions in turn."""
    action = reply["action"]
    assert {*action} <= {"body", "reason", "status_code"}
    body = action.get("body")
    if isinstance(body, dict) and "choices" in body:
        for choice in body["choices"]:
            assert {*choice} == {"message"}
            assert {*choice["message"]} == {"role", "content"}
        return [choice["message"]["content"] for choice in body["choices"]]
    return None


def test_flagged_choices_are_masked_in_their_places() -> None:
    with guarded(answer_only_threshold=0.3) as on:
        reply = post(on, "/response", choices("fine", "FORBIDDEN", "HOPELESS")).json()
        assert read(reply) == ["fine", SAFE, REFUSAL]
        assert read(post(on, "/response", choices("fine", "good")).json()) is None
        assert {(query, threshold) for query, _, threshold in on.guard.asked} == {("", 0.3)}
    with guarded(on_flag="refuse") as on:
        assert read(post(on, "/response", choices("FORBIDDEN")).json()) == [REFUSAL]


def test_requests_pass_in_either_format() -> None:
    with guarded() as on:
        turns = [{"role": "user", "content": "FORBIDDEN"}]
        for body in ({"body": {"messages": turns}}, {"messages": turns, "model": "m"}):
            reply = post(on, "/request", body).json()
            assert read(reply) is None
            assert "messages" not in reply
        assert on.guard.asked == []


def test_without_a_verdict_the_gateway_gets_an_error() -> None:
    with guarded() as on:
        assert post(on, "/response", choices("fine", "DOWN")).status_code == 503
    with guarded(shadow=True) as on:
        assert read(post(on, "/response", choices("DOWN", "FORBIDDEN")).json()) is None


def test_what_cannot_be_read_is_an_error() -> None:
    message = {"role": "assistant", "content": "a"}
    with guarded() as on:
        for body in (
            {},
            {"body": []},
            {"body": {"choices": {}}},
            {"body": {"choices": ["a"]}},
            {"body": {"choices": [{"message": "a"}]}},
            {"body": {"choices": [{"message": {**message, "content": None}}]}},
            {"body": {"choices": [{"message": {**message, "content": [{"text": "a"}]}}]}},
            {"body": {"choices": [{"message": {"content": "a"}}]}},
        ):
            assert post(on, "/response", body).status_code == 400, body
        assert on.guard.asked == []
