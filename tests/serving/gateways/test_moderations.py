"""/v1/moderations, with the official client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.gateways.moderations import CATEGORIES
from tests.serving.fakes import SAFE, Served
from tests.serving.gateways.paths import KEYS, guarded, post

PATH = "/v1/moderations"
IMAGE = {"type": "image_url", "image_url": {"url": "https://127.0.0.1:1/never-fetched.png"}}


@pytest.fixture
def on() -> Iterator[Served]:
    with guarded(answer_only_threshold=0.3) as front:
        yield front


def client(on: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{on.url}/v1", api_key=key, max_retries=0)


def test_the_official_client_gets_a_result_for_each_text(on: Served) -> None:
    made = client(on).moderations.create(
        input=["fine", "FORBIDDEN", "HOPELESS"], extra_body={"question": ["Why?", "Who?", "How?"]}
    )
    assert [result.flagged for result in made.results] == [False, True, True]
    assert [query for query, _, _ in on.guard.asked] == ["Why?", "Who?", "How?"]
    own: Any = [result.model_dump()["mllm_protector"] for result in made.results]
    assert own[1] == {"outcome": "refused", "score": 0.95}
    assert [each["score"] for each in own] == [0.1, 0.95, 0.95]


def test_categories_claim_nothing(on: Served) -> None:
    [result] = post(on, PATH, {"input": "FORBIDDEN"}).json()["results"]
    assert result["flagged"] is True
    for part in ("categories", "category_scores"):
        assert result[part] == dict.fromkeys(CATEGORIES), part
    parsed = client(on).moderations.create(input="fine").results[0]
    assert {*parsed.categories.model_dump(by_alias=True)} == {*CATEGORIES}
    assert parsed.category_applied_input_types.hate == ["text"]


def test_a_rewrite_comes_on_request(on: Served) -> None:
    body = {"input": ["fine", "FORBIDDEN", "HOPELESS"], "rewrite": True}
    texts = [each["mllm_protector"]["text"] for each in post(on, PATH, body).json()["results"]]
    assert texts == ["fine", SAFE, REFUSAL]
    assert on.guard.asked[0][::2] == ("", 0.3)


def test_parts_are_one_input_and_images_are_not_read(on: Served) -> None:
    parts: Any = [{"type": "text", "text": "fine"}, IMAGE, {"type": "text", "text": "FORBIDDEN"}]
    assert [each.flagged for each in client(on).moderations.create(input=parts).results] == [True]
    assert on.guard.asked[0][1] == "fine\nFORBIDDEN"
    assert post(on, PATH, {"input": [IMAGE]}).status_code == 400


def test_what_cannot_be_read_is_an_error(on: Served) -> None:
    for body in (
        {},
        {"input": []},
        {"input": 7},
        {"input": ["a", IMAGE]},
        {"input": [{"type": "text", "text": 7}]},
        {"input": ["a"] * 513},
        {"input": "a", "question": 7},
        {"input": "a", "question": [7]},
        {"input": ["a", "b"], "question": "Why?"},
        {"input": "a", "rewrite": "yes"},
        {"input": "a", "model": 7},
        ["a"],
    ):
        assert post(on, PATH, body).status_code == 400, body
    assert on.guard.asked == []


def test_limits_and_keys_are_those_of_the_other_routes() -> None:
    with guarded(keys=KEYS, limits={"body_mb": 0.001}) as on:
        assert client(on, "one").moderations.create(input="fine").results[0].flagged is False
        for key, body, status in (("three", {"input": "a"}, 401), ("one", {"input": "a" * 1000}, 413)):
            assert post(on, PATH, body, authorization=f"Bearer {key}").status_code == status
    with guarded() as on:
        assert post(on, PATH, {"input": "DOWN"}).status_code == 503
        assert post(on, PATH, {"input": "a"}, **{"content-type": "text/plain"}).status_code == 415
        for path in ("/v1/moderations/", "/v1/completions", "/v1/responses", "/v1/messages"):
            assert post(on, path, {"input": "a"}).status_code == 404, path
