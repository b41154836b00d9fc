"""The official client of OpenAI against a front: what it parses is what a user's program sees."""

import asyncio
import base64
import json
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from mllm_protector.prompts import REFUSAL
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
    stream,
)
from tests.serving.fakes import served as serve
from tests.serving.test_proxy import to

WEATHER = {"name": "weather", "arguments": '{"city": "Paris"}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str


def echo(asked: Asked) -> Said:
    """An upstream that says what it was asked; tool calls and images as the words want them."""
    content = asked.body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    if text == "limit":
        error = {"error": {"message": "slowly", "type": "rate", "code": "rate_limit"}}
        return Said(
            [json.dumps(error).encode()], 429, {"content-type": "application/json", "retry-after": "0"}
        )
    if "tools" in asked.body:
        arguments = WEATHER if text == "weather" else {**WEATHER, "arguments": json.dumps({"city": text})}
        call = {"id": "call1", "type": "function", "function": arguments}
        if asked.body.get("stream"):
            return stream(chunk({"tool_calls": [{"index": 0, **call}]}), chunk({}, end="tool_calls"), DONE)
        return completion(message(None, tool_calls=[call]) | {"finish_reason": "tool_calls"})
    if asked.body.get("stream"):
        usage = [USAGE_CHUNK] if asked.body.get("stream_options") else []
        return stream(
            chunk({"role": "assistant"}), chunk({"content": text}), chunk({}, end="stop"), *usage, DONE
        )
    return completion(*(message(text, each) for each in range(asked.body.get("n", 1))))


@pytest.fixture(scope="module")
def front() -> Iterator[Served]:
    with serve(echo, to) as on:
        yield on


@pytest.fixture(scope="module")
def client(front: Served) -> OpenAI:
    return OpenAI(base_url=f"{front.url}/v1", api_key="client", max_retries=0)


def user(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_plain_answers(client: OpenAI) -> None:
    for text, shown, reason in (
        ("fine", "fine", "stop"),
        ("FORBIDDEN", SAFE, "stop"),
        ("HOPELESS", REFUSAL, "content_filter"),
    ):
        answer = client.chat.completions.create(model="m", messages=user(text), n=2)
        for choice in answer.choices:
            assert (choice.message.content, choice.finish_reason) == (shown, reason)
        assert answer.usage is not None
        assert answer.usage.total_tokens == USAGE["total_tokens"]


def test_the_header_says_what_was_done(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="m", messages=user("FORBIDDEN"))
    assert raw.headers["x-mllm-protector"] == "rewritten"


def test_streams(client: OpenAI) -> None:
    for text, shown in (("fine\u2028fine", "fine\u2028fine"), ("FORBIDDEN", SAFE)):
        options = {"include_usage": True}
        events = [
            *client.chat.completions.create(
                model="m", messages=user(text), stream=True, stream_options=options
            )
        ]
        said = [event.choices[0].delta.content or "" for event in events if event.choices]
        assert "".join(said) == shown
        assert events[-1].usage is not None
    with client.chat.completions.stream(model="m", messages=user("FORBIDDEN")) as stream:
        assert stream.get_final_completion().choices[0].message.content == SAFE


def test_the_asynchronous_client(front: Served) -> None:
    async def ask() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{front.url}/v1", api_key="client", max_retries=0) as client:
            whole = await client.chat.completions.create(model="m", messages=user("FORBIDDEN"))
            stream = await client.chat.completions.create(model="m", messages=user("fine"), stream=True)
            said = [event.choices[0].delta.content or "" async for event in stream]
        return whole.choices[0].message.content, "".join(said)

    assert asyncio.run(ask()) == (SAFE, "fine")


def test_parse_takes_a_rewritten_answer_as_a_refusal(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="m", messages=user('{"name": "Paris"}'), response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Paris")
    answer = client.chat.completions.parse(
        model="m", messages=user('{"name": "FORBIDDEN"}'), response_format=City
    )
    [choice] = answer.choices
    assert (choice.message.parsed, choice.message.refusal, choice.finish_reason) == (None, SAFE, "stop")
    assert (
        client.chat.completions.parse(model="m", messages=user("FORBIDDEN")).choices[0].message.content
        == SAFE
    )


def test_tools(client: OpenAI) -> None:
    for text, shown in (("weather", WEATHER), ("FORBIDDEN", None)):
        answer = client.chat.completions.create(model="m", messages=user(text), tools=[TOOL])
        [choice] = answer.choices
        if shown:
            assert choice.message.tool_calls is not None
            assert choice.message.tool_calls[0].function.model_dump() == shown
            assert choice.finish_reason == "tool_calls"
        else:
            assert (choice.message.tool_calls, choice.message.content) == (None, REFUSAL)
    with client.chat.completions.stream(model="m", messages=user("weather"), tools=[TOOL]) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
        assert call.function.arguments == WEATHER["arguments"]


def test_images_go_to_the_upstream_as_they_are_and_not_to_the_guard(front: Served, client: OpenAI) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"canary").decode()
    parts = [{"type": "text", "text": "fine"}, {"type": "image_url", "image_url": {"url": uri}}]
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "fine"
    assert front.upstream.asked[-1].body["messages"][0]["content"] == parts
    assert front.guard.asked[-1][:2] == ("fine", "fine")


def test_errors_are_those_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.RateLimitError, match="slowly"):
        client.chat.completions.create(model="m", messages=user("limit"))
    with pytest.raises(openai.NotFoundError, match="/v1/responses is not served"):
        client.responses.create(model="m", input="fine")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served"):
        client.embeddings.create(model="m", input="fine")
    with pytest.raises(openai.BadRequestError, match="at most 8"):
        client.chat.completions.create(model="m", messages=user("fine"), n=9)
