"""Lines of the log: what they say, and that no text of a client or a model gets into them."""

import asyncio
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mllm_protector.serving import logs
from mllm_protector.serving.exchange import CURRENT, begin
from mllm_protector.serving.settings import ApiKey, FrontSettings
from mllm_protector.serving.upstream import ModelNames
from tests.serving.builders import policy_settings
from tests.serving.fakes import HTTP, Said, completion, message, served
from tests.serving.test_faulty_upstream import leave
from tests.serving.test_proxy import CANARY, QUESTION, ask, saying, to

OWN_ID = "0123456789abcdef0123456789abcdef"


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The lines of the log, all of them there after the block."""
    stream, lines = io.StringIO(), list[dict[str, Any]]()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("front"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


def answers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "route" in line]


def test_each_answer_is_a_line_with_what_became_of_it() -> None:
    models = Said([json.dumps({"data": [{"id": "m"}, {"id": "two words"}, 3]}).encode()])
    answer = completion(message("FORBIDDEN"))
    with logged() as lines, served(lambda asked: models if "models" in asked.path else answer, to) as on:
        first = ask(on, **{"x-request-id": OWN_ID})
        HTTP.get(f"{on.url}/ready")
        ask(on)
        ask(on, {**QUESTION, "n": 100})
        HTTP.post(f"{on.url}/v1/completions")
        HTTP.get(f"{on.url}/health")
    one, two, refused, other = answers(lines)
    assert first.headers["x-request-id"] == one["request_id"] == OWN_ID
    assert on.upstream.asked[0].headers["x-request-id"] == OWN_ID
    seen = {name: one[name] for name in ("process", "level", "route", "status", "outcome", "model")}
    assert seen == {
        "process": "front",
        "level": "info",
        "route": "/v1/chat/completions",
        "status": 200,
        "outcome": "rewritten",
        "model": "other",
    }
    assert 0 < one["seconds"] < 30
    assert two["model"] == "m"
    assert two["request_id"] not in ("", OWN_ID)
    assert (refused["status"], refused["error"]) == (400, "invalid_request")
    assert (other["route"], other["status"]) == ("other", 404)


def test_an_id_of_a_client_is_kept_only_if_nothing_can_be_said_in_it() -> None:
    said = Said([b"{}"], status=429, headers={"x-request-id": "theirs"})
    with served(saying(said), to) as on:
        for given in ("", "short", "sentence-with-a-canary-in-it", 65 * "a", OWN_ID[:-1] + "\u00e9"):
            answer = HTTP.get(f"{on.url}/v1/models", headers={"x-request-id": given.encode()})
            assert len(answer.headers["x-request-id"]) == 32, given
            assert answer.headers["x-request-id"] not in (given, "theirs")
            assert answer.headers["x-upstream-request-id"] == "theirs"
        given = "0A1B2C3D-0000-4000-8000-123456789abc"
        answer = HTTP.get(f"{on.url}/health", headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


def test_no_canary_gets_into_logs_or_metrics() -> None:
    key = f"sk-{CANARY}"
    keys = [ApiKey(name="ann", sha256=hashlib.sha256(key.encode()).hexdigest())]

    def settings(url: str) -> FrontSettings:
        return to(url, keys=keys)

    given = {"authorization": f"Bearer {key}", "x-request-id": CANARY, "user-agent": CANARY, "cookie": CANARY}
    question = {"model": CANARY, "messages": [{"role": "user", "content": CANARY}], "user": CANARY}
    for word in ("fine", "FORBIDDEN", "HOPELESS", "DOWN", "BUG", "BUSY"):
        said = completion(message(f"{word} {CANARY}"), model=CANARY)
        with logged() as lines, served(saying(said), settings) as on:
            ask(on, question, **given)
            ask(on, {**question, "stream": True}, **given)
            ask(on, {**question, "n": CANARY}, **given)
            ask(on, question, authorization=f"Bearer x{key}", traceparent=CANARY)
            HTTP.post(f"{on.url}/v1/{CANARY}?q={CANARY}", headers=given)
            HTTP.request(CANARY, f"{on.url}/v1/models", headers=given)
            HTTP.get(f"{on.url}/?q={CANARY}", headers=given)
            metrics = HTTP.get(f"{on.url}/metrics").text
        assert "request_seconds" in metrics
        assert len(answers(lines)) == 6
        assert CANARY.lower() not in (metrics + json.dumps(lines)).lower(), word


def test_words_of_libraries_and_of_exceptions_are_left_out() -> None:
    with logged() as lines:
        logging.getLogger("asyncio").error("Task exception was never retrieved: %s", CANARY)
        try:
            raise ValueError(CANARY)
        except ValueError:
            logging.getLogger("mllm_protector.test").exception("it broke\n")
    library, error = lines
    assert (library["logger"], library["message"]) == ("asyncio", logs.LEFT_OUT)
    assert library["place"].startswith("test_logs:")
    assert error["message"] == "it broke"
    assert error["error"].startswith("ValueError at test_words_of_libraries")
    assert CANARY not in json.dumps(lines)


def test_lines_belong_to_their_request_also_in_its_tasks() -> None:
    log = logging.getLogger("mllm_protector.test")

    async def deep() -> None:
        log.warning("it happened")

    async def request(number: str) -> None:
        begin(16 * number)
        await asyncio.sleep(0.01)
        await asyncio.gather(deep(), deep())

    async def both() -> None:
        await asyncio.gather(request("1"), request("2"))

    with logged() as lines:
        asyncio.run(both())
        log.warning("outside")
    found = [line.get("request_id", "") for line in lines if line["message"] != logs.LEFT_OUT]
    assert sorted(found) == ["", *2 * [16 * "1"], *2 * [16 * "2"]]
    assert CURRENT.get() is None


def test_a_process_logs_json_to_its_standard_error_and_nothing_of_httpx() -> None:
    code = (
        "import logging; from mllm_protector.serving import logs; logs.configure('model worker');"
        "logging.getLogger('httpx').info('secret'); logging.getLogger('mllm_protector.x').info('ready\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=os.environ)
    assert not done.stdout
    [line] = done.stderr.splitlines()
    found = json.loads(line)
    assert (found["message"], found["process"], found["level"]) == ("ready", "model worker", "info")
    assert found["time"].endswith("+00:00")


def test_only_names_that_the_upstream_or_the_config_gives_are_known() -> None:
    names = ModelNames()
    names.add(policy_settings(model_thresholds={"mine": 0.5}).model_thresholds)
    names.learn(b'{"data": [{"id": "org/name:7b"}, {"id": "a sentence"}, {"id": 7}, "x"]}')
    for odd in (b"[]", b"{", b'{"data": 3}', b"\xff"):
        names.learn(odd)
    assert [names.known(name) for name in ("mine", "org/name:7b", "a sentence", "x", "")] == [
        *("mine", "org/name:7b"),
        *("other", "other", "other"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_is_a_line_without_status(streaming: bool) -> None:
    with logged() as lines, served(saying(Said([5.0])), to) as on:
        leave(on, stream=streaming, after=b"")
    [line] = answers(lines)
    assert line["message"] == "a client left"
    assert "status" not in line
