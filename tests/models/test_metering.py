import threading
import time
from collections import Counter

import pytest

from mllm_protector.errors import InputError
from mllm_protector.models.chat import ServedChat
from mllm_protector.models.metering import NOT_SENT, NOTHING, Usage, complete_metered
from mllm_protector.records import Failure
from tests import servers
from tests.generation.scripted import counted
from tests.servers import Reply, Request, ScriptedServer

USAGE = Usage(prompt=100, completion=20)


class Notes:
    """Admits so many requests of each conversation, and takes note of everything in its order."""

    def __init__(self, admitted: int = 99) -> None:
        self.admitted = admitted
        self.requests: Counter[int] = Counter()
        self.events: dict[int, list[object]] = {}
        self.stop = threading.Event()

    def stopped(self) -> bool:
        return self.stop.is_set()

    def admit(self, index: int) -> bool:
        self.requests[index] += 1
        return self.requests[index] <= self.admitted and not self.stopped()

    def charge(self, index: int, usage: Usage | None) -> None:
        self.events.setdefault(index, []).append(usage)

    def keep(self, index: int, reply: str | Failure) -> None:
        self.events.setdefault(index, []).append(reply)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def chat(address: str, **changes: float) -> ServedChat:
    settings = {"concurrency": 3, "timeout": 5.0, "max_retries": 2, "temperature": 0.0} | changes
    return ServedChat(model="m", base_url=address, api_key_env=None, **settings)  # type: ignore[arg-type]


def say(*words: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": word}] for word in words]


def test_each_reply_is_kept_as_it_comes_and_then_charged() -> None:
    notes = Notes()

    def script(request: Request) -> Reply:
        # The last one comes only when the first one is kept.
        while request.text == "c" and 0 not in notes.events:
            threading.Event().wait(0.01)
        return counted(f"re {request.text}")

    with ScriptedServer(script) as server:
        replies = complete_metered(
            chat(server.base_url), say("a", "b", "c"), max_tokens=5, seeds=None, meter=notes
        )
    assert replies == ["re a", "re b", "re c"]
    assert notes.events == {index: [reply, USAGE] for index, reply in enumerate(replies)}
    assert notes.requests == {0: 1, 1: 1, 2: 1}


def test_a_repeat_is_a_request_of_its_own_and_an_error_status_costs_no_tokens() -> None:
    notes = Notes()
    script = [servers.failed(500), servers.too_many(), counted("fine")]
    with ScriptedServer(script) as server:
        assert complete_metered(chat(server.base_url), say("a"), max_tokens=5, seeds=None, meter=notes) == [
            "fine"
        ]
    assert notes.events == {0: [NOTHING, NOTHING, "fine", USAGE]}
    assert notes.requests == {0: 3}


@pytest.mark.parametrize("admitted", [0, 1, 2])
def test_what_is_not_admitted_is_not_sent(admitted: int) -> None:
    notes = Notes(admitted)
    with ScriptedServer([servers.failed(500)]) as server:
        assert complete_metered(chat(server.base_url), say("a"), max_tokens=5, seeds=None, meter=notes) == [
            NOT_SENT
        ]
        assert server.count == admitted
    assert notes.events.get(0, []) == [NOTHING] * admitted  # and no reply is kept


@pytest.mark.parametrize("reply", [servers.slow(5), servers.reset(), servers.cut_json(), servers.text("x")])
def test_what_nobody_counted_is_said_to_be_unknown(reply: Reply) -> None:
    notes = Notes()
    with ScriptedServer([reply]) as server:
        complete_metered(
            chat(server.base_url, timeout=0.3, max_retries=0), say("a"), max_tokens=5, seeds=None, meter=notes
        )
    assert None in notes.events[0]
    assert len(notes.events[0]) == 2


def test_where_nobody_listens_nothing_is_charged() -> None:
    notes = Notes()
    with ScriptedServer(["x"]) as server:
        address = server.base_url
    [failure] = complete_metered(chat(address), say("a"), max_tokens=5, seeds=None, meter=notes)
    assert isinstance(failure, Failure)
    assert failure.unreachable
    assert notes.events == {0: [NOTHING, NOTHING, NOTHING, failure]}


def test_a_refused_key_is_charged_and_ends_everything() -> None:
    notes = Notes()
    with ScriptedServer([servers.failed(401)]) as server, pytest.raises(InputError):
        complete_metered(chat(server.base_url), say("a"), max_tokens=5, seeds=None, meter=notes)
    assert notes.events == {0: [NOTHING]}


def test_a_call_without_a_meter_beside_one_with_a_meter_is_not_counted() -> None:
    notes = Notes()
    with ScriptedServer(["fine"]) as server:
        model = chat(server.base_url)
        complete_metered(model, say("a"), max_tokens=5, seeds=None, meter=notes)
        assert model.complete(say("a", "b", "c"), max_tokens=5) == ["fine"] * 3
    assert notes.requests == {0: 1}


def test_a_run_that_is_stopped_waits_for_replies_that_come_soon_and_gives_up_the_others() -> None:
    notes = Notes()

    def script(request: Request) -> Reply:
        notes.stop.set()
        return counted(f"re {request.text}", seconds=60 if request.text == "b" else 0.5)

    started = time.monotonic()
    with ScriptedServer(script) as server:
        replies = complete_metered(
            chat(server.base_url, concurrency=2), say(*"abcd"), max_tokens=5, seeds=None, meter=notes
        )
    assert time.monotonic() - started < 4
    assert replies == ["re a", NOT_SENT, NOT_SENT, NOT_SENT]
    assert notes.events == {0: ["re a", USAGE], 1: [None]}
