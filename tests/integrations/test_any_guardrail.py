"""The guard as ``any-guardrail`` calls its guardrails, within the process and behind a server."""

from collections.abc import Iterator

import pytest
from any_guardrail import Guardrail, GuardrailOutput

from mllm_protector.errors import InputError, RunError
from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.integrations.any_guardrail import LocalGuardrail, ServedGuardrail
from mllm_protector.prompts import REFUSAL
from tests.serving.fakes import SAFE, serving
from tests.serving.gateways.paths import KEYS, guarded
from tests.serving.stubs import StubCorrector, StubDetector


@pytest.fixture
def served() -> Iterator[tuple[str, list[tuple[str, str, float | None]]]]:
    with guarded(keys=KEYS) as on:
        yield f"{on.url}/v1", on.guard.asked


def summary(output: GuardrailOutput) -> tuple[bool, float | None, str | None, str | None]:
    GuardrailOutput.model_validate_json(output.model_dump_json())
    assert output.usage is not None
    assert output.usage.model_id == "mllm-protector"
    assert output.usage.latency_ms is not None
    return output.valid, output.score, output.modified_text, output.action


def test_a_guard_in_this_process_gives_a_score_and_a_rewrite() -> None:
    guardrail = LocalGuardrail(Protector(StubDetector(), StubCorrector(), 0.5))
    assert isinstance(guardrail, Guardrail)
    assert summary(guardrail.validate("Why?", output_text="fine")) == (True, 0.1, None, None)
    made = guardrail.validate(["Why?", "How?"], output_text=["a harmful answer", "fine"])
    assert [summary(each) for each in made] == [
        (False, 0.9, "Here is a better idea.", "rewrite"),
        (True, 0.1, None, None),
    ]
    refusing = LocalGuardrail(Protector(StubDetector(), Refusal(), 0.5))
    assert summary(refusing.validate("Why?", output_text="a harmful answer"))[2:] == (REFUSAL, "refuse")


def test_a_guard_that_fails_does_not_pass_an_answer() -> None:
    guardrail = LocalGuardrail(Protector(StubDetector(lambda answer: float("nan")), Refusal(), 0.5))
    output = guardrail.validate("Why?", output_text="fine")
    assert summary(output) == (False, None, REFUSAL, "refuse")
    assert output.explanation is not None


def test_a_server_gives_the_same(served: tuple[str, list[tuple[str, str, float | None]]]) -> None:
    url, asked = served
    guardrail = ServedGuardrail(url, api_key="one")
    made = guardrail.validate(["1?", "2?", "3?"], output_text=["fine", "FORBIDDEN", "HOPELESS"])
    assert [summary(each) for each in made] == [
        (True, 0.1, None, None),
        (False, 0.9, SAFE, "rewrite"),
        (False, 0.95, REFUSAL, "refuse"),
    ]
    assert [query for query, _, _ in asked] == ["1?", "2?", "3?"]
    assert guardrail.validate("1?", output_text="fine").valid


def test_without_a_verdict_there_is_an_error(served: tuple[str, object]) -> None:
    for url, key, answer in ((served[0], "three", "fine"), ("http://127.0.0.1:9/v1", "one", "fine")):
        with pytest.raises(RunError, match="no verdict"):
            ServedGuardrail(url, api_key=key, timeout_s=5).validate("Why?", output_text=answer)


def test_a_server_that_is_no_guard_is_no_verdict() -> None:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    own = {"outcome": "allowed", "score": 0.1, "text": "fine"}
    for results in (
        [],
        [{"flagged": False}],
        [{"flagged": True, "mllm_protector": own}],
        [{"flagged": False, "mllm_protector": {**own, "outcome": "other"}}],
        [{"flagged": False, "mllm_protector": own}] * 2,
    ):
        reply = JSONResponse({"id": "1", "model": "m", "results": results})
        app = Starlette(routes=[Route("/v1/moderations", reply, methods=["POST"])])
        with serving(app) as url, pytest.raises(RunError, match="verdict"):
            ServedGuardrail(f"{url}/v1").validate("Why?", output_text="fine")


def test_answers_and_questions_must_fit_together() -> None:
    guardrail = LocalGuardrail(Protector(StubDetector(), Refusal(), 0.5))
    with pytest.raises(InputError):
        guardrail.validate(["1?", "2?"], output_text=["fine"])
    with pytest.raises(InputError):
        guardrail.validate("1?", output_text=["fine"])  # type: ignore[call-overload]
