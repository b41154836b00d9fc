"""Streams behind judged prefixes where guard, upstream or client do not do as they should."""

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx

from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.guarding import Guarded
from mllm_protector.serving.proxy import Front
from tests.serving.fakes import (
    CUT,
    DONE,
    HARMFUL,
    HTTP,
    SAFE,
    Asked,
    Piece,
    Said,
    Upstream,
    WordGuard,
    chunk,
    served,
    stream,
)
from tests.serving.processes import until
from tests.serving.stubs import StubDetector, running
from tests.serving.test_faulty_upstream import leave
from tests.serving.test_proxy import QUESTION, saying
from tests.serving.test_streaming import ask, told, words
from tests.serving.window_streams import BAD, CUT_OFF, END, A, B, C, outcome, paced, part, windows


class Failing(WordGuard):
    """Gives no usable score where a word says so."""

    async def guard(
        self, query: str, answer: str, *, threshold: float | None = None, rewrite: bool = True
    ) -> Guarded:
        made = await super().guard(query, answer, threshold=threshold, rewrite=rewrite)
        return Guarded(made.outcome, answer, math.nan, 0.0) if "NAN" in answer else made


def test_a_guard_that_fails_in_the_middle_lets_nothing_more_pass() -> None:
    for word in ("DOWN", "BUG", "BUSY", "NAN"):
        guard = Failing()
        with served(saying(paced(guard, A, part(word), C, last=(30.0,))), windows(), guard) as on:
            answer = ask(on)
            events = told(answer)
            assert (words(events), outcome(events)) == (A + CUT_OFF, "guard_error"), word
            assert word not in answer.text.replace("_", "")
            assert on.count("stream_cuts_total", outcome="guard_error", mode="enforce") == 1
            assert on.count("unscanned_bytes_total") == 0
        guard = Failing()
        with served(
            saying(paced(guard, A, part(word), C, last=(30.0,))), windows(on_error="error"), guard
        ) as on:
            events = told(ask(on))
            assert words(events[:-1]) == A
            assert events[-1]["error"]["code"] == "guard_unavailable"
            assert on.upstream.gone.wait(5)


def test_a_guard_that_fails_from_the_beginning_gives_a_refusal_and_once_harms_nobody() -> None:
    guard = Failing()
    with served(saying(paced(guard, part("DOWN"), A)), windows(), guard) as on:
        answer = ask(on)
        assert (answer.headers["x-mllm-protector"], words(told(answer))) == ("guard_error", REFUSAL)

    class Once(WordGuard):
        async def guard(self, query: str, answer: str, **more: Any) -> Guarded:
            if len(self.asked) == 1:
                self.asked.append((query, answer, None))
                raise ZeroDivisionError
            return await super().guard(query, answer, **more)

    guard = Once()
    with served(saying(paced(guard, A, B, C)), windows(), guard) as on:
        assert words(told(ask(on))) == A + B + C


def test_an_upstream_that_breaks_off_is_an_error_behind_what_was_judged() -> None:
    error = b'data: {"error": {"message": "theirs"}}\n\n'
    for last, code in (
        ((chunk({"content": "rest"}), CUT), "upstream_cut"),
        ((error,), None),
        ((), "upstream_cut"),
    ):
        guard = WordGuard()
        with served(saying(paced(guard, A, last=last)), windows(), guard) as on:
            answer = ask(on)
            events = told(answer)
            assert words(events[:-1]) == A
            assert events[-1]["error"].get("code") == code
            assert "rest" not in answer.text
    with served(saying(Said([b'{"error": {"message": "theirs"}}'], 429)), windows()) as on:
        assert ask(on).status_code == 429


def test_a_client_that_leaves_while_the_guard_works_stops_everything() -> None:
    guard = WordGuard(30)
    with served(saying(stream(chunk({"content": A}), 30.0)), windows(ping_s=0.05), guard) as on:
        assert leave(on, stream=True, after=b": ping") < 5.0
        until(lambda: on.count("clients_gone_total") == 1)
        assert on.count("requests_under_way") == 0


def test_a_slow_guard_makes_longer_steps_and_the_upstream_is_read_on() -> None:
    sent = threading.Event()
    said = stream(*(chunk({"content": A}) for _ in range(40)), END, DONE, sent.set)
    guard = WordGuard(0.5)
    with served(saying(said), windows(), guard) as on:
        answering = threading.Thread(target=ask, args=(on,))
        answering.start()
        assert sent.wait(0.5 * 40)
        answering.join()
        assert len(guard.asked) <= 10
        assert guard.asked[-1][1] == A * 40


def test_comments_come_while_nothing_else_does() -> None:
    guard = WordGuard()
    said = paced(guard, A, B, last=(0.5, END, DONE))
    with served(saying(said), windows(ping_s=0.02), guard) as on:
        answer = ask(on)
        assert answer.text.count(": ping\n\n") >= 2
        assert words(told(answer)) == A + B


def test_wherever_harm_stands_it_is_never_seen() -> None:
    rng = random.Random(0)
    answers = {}
    for number in range(30):
        letters = [rng.choice("abc ") for _ in range(rng.randrange(120))]
        place = rng.randrange(len(letters) + 1)
        answers[f"question {number}"] = ("".join(letters[:place]), HARMFUL + "".join(letters[place:]))

    def script(asked: Asked) -> Said:
        text = "".join(answers[asked.body["messages"][0]["content"]])
        cuts = sorted(rng.sample(range(len(text)), min(8, len(text))))
        borders = [0, *cuts, len(text)]
        pieces: list[Piece] = []
        for start, stop in pairwise(borders):
            pieces += [chunk({"content": text[start:stop]}), rng.choice((0.0, 0.01))]
        return stream(*pieces, END, DONE)

    cut = 0
    with served(script, windows(), WordGuard(0.002)) as on:
        for question, answer in answers.items():
            body = {"stream": True, "messages": [{"role": "user", "content": question}]}
            events = told(HTTP.post(f"{on.url}/v1/chat/completions", json=body))
            shown = words(events)
            out = shown.removesuffix(CUT_OFF)
            assert HARMFUL not in out
            assert shown == SAFE or (out != shown and "".join(answer).startswith(out))
            cut += shown != SAFE
        assert 0 < cut < len(answers)
        assert on.count("unscanned_bytes_total") == 0


def test_windows_are_scored_by_the_model_worker_at_the_threshold_of_its_detector() -> None:
    detector = StubDetector(lambda answer: 0.65 if HARMFUL in answer else 0.55)

    async def ask_it() -> tuple[httpx.Response, Front]:
        async with running(detector, threshold=0.6) as worker:
            with Upstream(lambda asked: stream(*pieces, END, DONE)) as upstream:
                front = Front(windows()(upstream.url), worker.client)
                pieces = [chunk({"content": A}), released(front), chunk({"content": BAD})]
                app = httpx.ASGITransport(front.app())
                async with httpx.AsyncClient(transport=app, base_url="http://front") as client:
                    body = {**QUESTION, "stream": True}
                    return await client.post("/v1/chat/completions", json=body), front

    def released(front: Front) -> Callable[[], None]:
        count = front.state.metrics.registry.get_sample_value

        def wait() -> None:
            end = time.monotonic() + 60
            while not count("mllm_protector_released_bytes_total") and time.monotonic() < end:
                time.sleep(0.005)

        return wait

    answer, front = asyncio.run(ask_it())
    assert words(told(answer)) == A + CUT_OFF
    assert HARMFUL not in answer.text
    assert {A, A + BAD} <= {text for call in detector.calls for text in call}
    assert front.state.metrics.registry.get_sample_value("mllm_protector_unscanned_bytes_total") == 0
