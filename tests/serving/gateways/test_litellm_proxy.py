"""A real LiteLLM proxy between clients and the guard: what its installed release does with our replies.

``make contracts`` installs it. LITELLM names another one.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.gateways.litellm import BLOCKED
from tests.serving.fakes import (
    DONE,
    SAFE,
    USAGE,
    USAGE_CHUNK,
    Asked,
    Said,
    Served,
    chunk,
    completion,
    message,
    served,
    stream,
)
from tests.serving.gateways.paths import KEYS
from tests.serving.test_proxy import to

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LITELLM = os.environ.get("LITELLM") or str(HERE.parents[2] / ".venv-contracts/bin/litellm")
KEY = "sk-0123456789abcdef0123456789abcdef"
STARTED_S = 180.0
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


def echo(asked: Asked) -> Said:
    """An upstream that says what it was asked, in words, in a tool call or as a Responses object."""
    if asked.path.endswith("/responses"):
        return responded(asked.body["input"], bool(asked.body.get("stream")))
    text, count = asked.body["messages"][-1]["content"], asked.body.get("n", 1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
    if asked.body.get("stream"):
        parts = [{"content": word} for word in text.split(" ")]
        if "tools" in asked.body:
            parts = [{"tool_calls": [{"index": 0, **call}]}]
        words = [chunk(part, index=index) for index in range(count) for part in parts]
        ends = [chunk({}, index=index, end="stop") for index in range(count)]
        return stream(chunk({"role": "assistant"}), *words, *ends, USAGE_CHUNK, DONE)
    if "tools" in asked.body:
        return completion(message(None, tool_calls=[call]) | {"finish_reason": "tool_calls"})
    thought = {"reasoning_content": "FORBIDDEN"} if text == "thought" else {}
    choices = [message(text if index == 0 else "other", index, **thought) for index in range(count)]
    if asked.body.get("logprobs"):
        choices[0]["logprobs"] = {"content": [{"token": text, "logprob": -1.0, "top_logprobs": []}]}
    return completion(*choices)


def responded(text: str, streamed: bool) -> Said:
    part = {"type": "output_text", "text": text, "annotations": []}
    output = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
    whole = {"id": "r", "object": "response", "created_at": 1, "model": "toy", "status": "completed"}
    whole |= {"output": [output], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    if not streamed:
        return Said([json.dumps(whole).encode()])
    place = {"item_id": "m", "output_index": 0, "content_index": 0, "sequence_number": 1}
    events = (
        {"type": "response.created", "response": {**whole, "status": "in_progress", "output": []}},
        {"type": "response.output_text.delta", "delta": text, **place},
        {"type": "response.output_text.done", "text": text, **place},
        {"type": "response.completed", "response": whole},
    )
    return stream(*(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in events))


@dataclass
class Gateway:
    """LiteLLM, and the front it asks."""

    client: openai.OpenAI
    front: Served

    def ask(self, text: str, guard: str = "guard", model: str = "toy", **more: Any) -> Any:
        headers = more.pop("extra_headers", None)
        return self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            extra_body={"guardrails": [guard]},
            extra_headers=headers,
            **more,
        )

    def says(self, text: str, guard: str = "guard", **more: Any) -> list[str]:
        return [choice.message.content for choice in self.ask(text, guard, **more).choices]

    def streams(self, text: str, guard: str = "guard", **more: Any) -> dict[int, str]:
        """The text of each choice."""
        said: dict[int, str] = {}
        for part in self.ask(text, guard, stream=True, **more):
            for choice in part.choices:
                said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
        return said


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    assert Path(LITELLM).exists(), f"{LITELLM} is not installed: make contracts"
    folder = tmp_path_factory.mktemp("litellm")
    with served(echo, lambda url: to(url, keys=KEYS, policy={"answer_only_threshold": 0.3})) as front:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"UPSTREAM": front.upstream.url, "GUARD": front.url, "GUARD_KEY": "one"}
        env |= {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
        command = [
            LITELLM,
            "--config",
            str(HERE / "litellm.yaml"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
        try:
            until_alive(f"http://127.0.0.1:{port}/health/liveliness", process)
            with httpx.Client(trust_env=False, timeout=60) as http:
                url = f"http://127.0.0.1:{port}/v1"
                client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=http)
                yield Gateway(client, front)
        finally:
            process.terminate()
            process.wait(30)


def until_alive(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + STARTED_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError("LiteLLM did not start")


def test_answers_are_passed_rewritten_or_refused(gateway: Gateway) -> None:
    assert gateway.says("fine") == ["fine"]
    assert gateway.says("FORBIDDEN") == [SAFE]
    assert gateway.says("HOPELESS") == [REFUSAL]
    assert gateway.says("FORBIDDEN", n=2) == [SAFE, "other"]


def test_the_question_is_found_by_the_call_unless_two_calls_claim_its_id(gateway: Gateway) -> None:
    asked = gateway.front.guard.asked
    asked.clear()
    gateway.says("fine")
    for text in ("fine", "other"):
        gateway.ask(text, extra_headers={"x-litellm-call-id": "chosen"})
    assert asked == [("fine", "fine", None), ("fine", "fine", None), ("", "other", 0.3)]


def test_streams_are_judged_whole_before_a_word_is_released(gateway: Gateway) -> None:
    for guard in ("guard", "sampled"):
        assert gateway.streams("this is fine", guard) == {0: "thisisfine"}
        assert gateway.streams("this is FORBIDDEN here", guard) == {0: SAFE}, guard
        assert gateway.streams("this is HOPELESS here", guard) == {0: REFUSAL}, guard
    assert gateway.streams("so FORBIDDEN", n=2) == {0: SAFE, 1: SAFE}
    parts = [*gateway.ask("fine", stream=True, stream_options={"include_usage": True})]
    assert parts[-1].usage.total_tokens == USAGE["total_tokens"]


def test_streams_by_its_own_default_lose_rewrites(gateway: Gateway) -> None:
    """Why the streaming keys must be in the configuration; here to notice if that changes."""
    assert "FORBIDDEN" in gateway.streams("this is FORBIDDEN here", "unset")[0]


def test_flagged_answers_can_be_blocked_instead(gateway: Gateway) -> None:
    for ask in (gateway.says, gateway.streams):
        with pytest.raises(openai.BadRequestError, match=BLOCKED):
            ask("this is FORBIDDEN", "blocking")
    assert gateway.streams("so fine", "blocking") == {0: "sofine"}


def test_flagged_tool_calls_are_blocked(gateway: Gateway) -> None:
    [choice] = gateway.ask("fine", tools=[TOOL]).choices
    assert choice.message.tool_calls[0].function.arguments == '{"a": "fine"}'
    with pytest.raises(openai.BadRequestError, match=BLOCKED):
        gateway.ask("FORBIDDEN", tools=[TOOL])
    with pytest.raises(openai.BadRequestError, match=BLOCKED):
        gateway.streams("FORBIDDEN", "blocking", tools=[TOOL])


def test_streamed_tool_calls_are_released_before_the_verdict(gateway: Gateway) -> None:
    """Why streamed tool calls need the blocking configuration; here to notice if that changes."""
    parts = iter(gateway.ask("FORBIDDEN", stream=True, tools=[TOOL]))
    assert "FORBIDDEN" in str(next(parts))
    with pytest.raises(openai.APIError, match=BLOCKED):
        next(parts)


def test_without_a_verdict_no_answer_is_shown(gateway: Gateway) -> None:
    for guard, text in (("guard", "DOWN"), ("guard", "BUSY"), ("blocking", "DOWN"), ("down", "fine")):
        for ask in (gateway.says, gateway.streams):
            with pytest.raises(openai.InternalServerError):
                ask(f"it is {text}", guard)


def test_log_probabilities_of_what_was_replaced_are_never_asked_for(gateway: Gateway) -> None:
    for model, kept in (("toy", False), ("careless", True)):
        [choice] = gateway.ask("FORBIDDEN", model=model, logprobs=True).choices
        assert choice.message.content == SAFE
        assert ("FORBIDDEN" in str(choice.logprobs)) == kept


def test_reasoning_is_not_shown_to_the_guard(gateway: Gateway) -> None:
    """Why a model that reasons belongs behind the proxy; here to notice if that changes."""
    [choice] = gateway.ask("thought").choices
    assert choice.message.reasoning_content == "FORBIDDEN"


def test_the_responses_route_is_guarded_too(gateway: Gateway) -> None:
    for text, said in (("fine", "fine"), ("FORBIDDEN", SAFE), ("HOPELESS", REFUSAL)):
        made = gateway.client.responses.create(model="toy", input=text, extra_body={"guardrails": ["guard"]})
        assert made.output_text == said


def test_streams_of_the_responses_route_need_the_blocking_configuration(gateway: Gateway) -> None:
    def said(text: str, guard: str) -> str:
        more = {"guardrails": [guard]}
        events = gateway.client.responses.create(model="toy", input=text, stream=True, extra_body=more)
        return str([*events])

    assert "fine" in said("fine", "blocking")
    assert "FORBIDDEN" in said("FORBIDDEN", "guard")
    blocked = said("FORBIDDEN", "blocking")
    assert BLOCKED in blocked
    assert "FORBIDDEN" not in blocked
