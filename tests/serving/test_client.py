import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mllm_protector import prompts
from mllm_protector.errors import InputError
from mllm_protector.records import Outcome
from mllm_protector.serving.client import GuardClient
from mllm_protector.serving.guarding import GuardUnavailable, Overloaded
from tests.serving.builders import queue_settings
from tests.serving.stubs import StubDetector, running, socket_folder, until

RAW = "placeholder of a harmful answer"
ALLOWED = {"outcome": "allowed", "text": RAW, "score": 0.1, "threshold": 0.5, "seconds": 0.1}
PONG = {"ready": True, "threshold": 0.5}

Script = Callable[[dict[str, Any]], Any]


@asynccontextmanager
async def scripted(script: Script, **changes: Any) -> AsyncIterator[GuardClient]:
    """A client of a worker that replies to a request what ``script`` returns: fields, bytes or nothing."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            reply = PONG if request["op"] == "ping" else script(request)
            if isinstance(reply, dict):
                reply = json.dumps({"id": request["id"], **reply}).encode() + b"\n"
            writer.write(reply or b"")
        writer.close()

    with socket_folder() as folder:
        server = await asyncio.start_unix_server(converse, folder / "guard.sock")
        async with GuardClient(folder / "guard.sock", queue_settings(**changes), reconnect_s=0.1) as client:
            await until(lambda: client.ready)
            yield client
        server.close()


def test_only_what_was_scored_below_the_threshold_passes() -> None:
    async def test() -> None:
        async with scripted(lambda request: ALLOWED) as client:
            for threshold in (None, 0.5):
                found = await client.guard("q", RAW, threshold=threshold)
                assert (found.outcome, found.text, found.score) == (Outcome.ALLOWED, RAW, 0.1)

    asyncio.run(test())


REFUSED = {"outcome": "refused", "text": prompts.REFUSAL, "score": 0.9, "threshold": 0.5}
ODD: dict[str, Any] = {
    "no score": ALLOWED | {"score": None},
    "a score that is no number": ALLOWED | {"score": float("nan")},
    "a score as text": ALLOWED | {"score": "0.1"},
    "a score that is true or false": ALLOWED | {"score": False},
    "a score outside": ALLOWED | {"score": -1},
    "a score at the threshold": ALLOWED | {"score": 0.5},
    "another threshold": ALLOWED | {"threshold": 0.6},
    "no threshold": ALLOWED | {"threshold": None},
    "another text": ALLOWED | {"text": "of another request"},
    "no text": ALLOWED | {"text": None},
    "an unknown outcome": ALLOWED | {"outcome": "passed"},
    "no outcome": {name: value for name, value in ALLOWED.items() if name != "outcome"},
    "an outcome that is a list": ALLOWED | {"outcome": []},
    "nothing": {},
    "the raw answer as a rewrite": ALLOWED | {"outcome": "rewritten", "score": 0.9},
    "the raw answer as a refusal": REFUSED | {"text": RAW},
    "an empty rewrite": REFUSED | {"outcome": "rewritten", "text": " "},
    "an error": {"error": "failed"},
    "an error without a time": {"error": "overloaded"},
    "an error and an answer": ALLOWED | {"error": None},
}


def test_a_reply_with_anything_odd_about_it_is_no_pass() -> None:
    async def test() -> None:
        replies: list[dict[str, Any]] = []
        async with scripted(lambda request: replies[-1]) as client:
            for name, reply in ODD.items():
                replies.append(reply)
                with pytest.raises(GuardUnavailable):
                    pytest.fail(f"{name} passed: {await client.guard('q', RAW, threshold=0.5)}")
            replies.append(REFUSED)
            assert (await client.guard("q", RAW)).outcome == Outcome.REFUSED

    asyncio.run(test())


@pytest.mark.parametrize(
    "broken", [b"not JSON\n", b"[1]\n", b'{"outcome": "allowed"}\n', 20_000 * b"[" + b"\n"]
)
def test_a_connection_whose_replies_cannot_be_read_is_made_anew(broken: bytes) -> None:
    async def test() -> None:
        async with scripted(lambda request: broken if request["query"] == "break" else ALLOWED) as client:
            with pytest.raises(GuardUnavailable, match="lost"):
                await client.guard("break", RAW)
            await until(lambda: client.ready)
            assert (await client.guard("q", RAW)).outcome == Outcome.ALLOWED

    asyncio.run(test())


@pytest.mark.parametrize("other", [999, "1", None, 1.0, True])
def test_a_reply_to_another_id_answers_nobody(other: object) -> None:
    async def test() -> None:
        reply = json.dumps({**ALLOWED, "id": other}).encode() + b"\n"
        async with scripted(lambda request: reply, deadline_s=0.3) as client:
            with pytest.raises(GuardUnavailable, match=r"within 0\.3 s"):
                await client.guard("q", RAW)

    asyncio.run(test())


def test_a_late_reply_is_dropped_and_the_next_request_gets_its_own() -> None:
    async def test() -> None:
        detector = StubDetector()
        async with running(detector, deadline_s=2) as guard:
            detector.gate.clear()
            with pytest.raises(GuardUnavailable, match="within 2 s"):
                await guard.client.guard("q", "late")
            detector.gate.set()
            await until(lambda: guard.worker.queues.scoring.busy_since is None)
            found = await guard.client.guard("q", "in time")
            assert (found.outcome, found.text) == (Outcome.ALLOWED, "in time")
            assert guard.client.ready

    asyncio.run(test())


def test_overload_says_when_to_come_back() -> None:
    async def test() -> None:
        async with scripted(lambda request: {"error": "overloaded", "retry_after": 1.5}) as client:
            with pytest.raises(Overloaded) as caught:
                await client.guard("q", RAW)
            assert caught.value.retry_after == 1.5

    asyncio.run(test())


def test_a_threshold_that_is_none_is_refused_before_anything_is_sent() -> None:
    async def test() -> None:
        async with scripted(lambda request: ALLOWED) as client:
            for threshold in (float("nan"), 2, True):
                with pytest.raises(InputError, match="threshold="):
                    await client.guard("q", RAW, threshold=threshold)

    asyncio.run(test())


def test_without_a_worker_a_request_fails_at_once_and_later_ones_reach_it() -> None:
    async def test() -> None:
        with socket_folder() as folder:
            async with GuardClient(folder / "none.sock", queue_settings(), reconnect_s=0.1) as client:
                await asyncio.sleep(0.1)
                assert not client.ready
                with pytest.raises(GuardUnavailable, match="not connected"):
                    await client.guard("q", RAW)

    asyncio.run(test())


def test_a_lost_connection_fails_its_requests_which_are_not_sent_again() -> None:
    async def test() -> None:
        asked: list[str] = []

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                request = json.loads(line)
                if request["op"] == "ping":
                    writer.write(json.dumps({"id": request["id"], **PONG}).encode() + b"\n")
                    continue
                asked.append(request["answer"])
                if len(asked) == 10:
                    break
            writer.close()

        with socket_folder() as folder:
            server = await asyncio.start_unix_server(converse, folder / "guard.sock")
            async with GuardClient(folder / "guard.sock", queue_settings(), reconnect_s=0.1) as client:
                await until(lambda: client.ready)
                texts = [f"answer {index}" for index in range(10)]
                found = await asyncio.gather(
                    *(client.guard("q", text) for text in texts), return_exceptions=True
                )
                assert [type(each) for each in found] == 10 * [GuardUnavailable]
                await until(lambda: client.ready)
                assert asked == texts
            server.close()

    asyncio.run(test())


def test_no_text_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def rule(text: str) -> float:
        raise RuntimeError(text)

    async def test() -> None:
        async with running(StubDetector(rule), request_mb=0.01) as guard:
            found = await guard.client.guard("canary of a question", "canary of an answer")
            assert found.outcome == Outcome.GUARD_ERROR
            reader, writer = await asyncio.open_unix_connection(guard.path)
            writer.write(b'{"id": 1, "op": "canary"}\n')
            assert b"canary" not in await reader.readline()
            writer.write(5_000 * b"canary")
            await reader.read()
            writer.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(test())
    assert "failed at scoring" in caplog.text
    assert "canary" not in caplog.text
