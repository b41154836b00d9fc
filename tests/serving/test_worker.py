import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_protector import prompts
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.detoxifier import Detoxifier
from mllm_protector.records import Outcome
from mllm_protector.serving.guarding import Guarded, GuardUnavailable, Overloaded
from mllm_protector.serving.worker import load
from tests.serving.builders import guard_settings
from tests.serving.stubs import Running, StubCorrector, StubDetector, connected, honest, running, until

HARMFUL = "placeholder of a harmful answer"


def scenario(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    return run


def number(text: str) -> int:
    return int(re.findall(r"\d+", text)[0])


async def all_of(guard: Running, answers: list[str], **given: Any) -> list[Guarded]:
    return await asyncio.gather(*(guard.client.guard("a question", answer, **given) for answer in answers))


@scenario
async def test_requests_at_once_are_scored_in_few_batches() -> None:
    detector = StubDetector()
    async with running(detector, patience_ms=50) as guard:
        found = await all_of(guard, [f"answer {index}" for index in range(64)])
    assert {each.outcome for each in found} == {Outcome.ALLOWED}
    assert len(detector.calls) <= 8
    assert sum(map(len, detector.calls)) == 64


@scenario
async def test_none_of_200_different_requests_gets_anothers_reply() -> None:
    detector = StubDetector(lambda text: 0.0 if "better" in text else number(text) / 1000)
    corrector = StubCorrector(lambda answer: f"Here is a better idea, which is number {number(answer)}.")
    async with running(detector, corrector, threshold=0.1) as guard:
        found = await all_of(guard, [f"answer {index}" for index in range(200)])
    for index, each in enumerate(found):
        assert each.score == index / 1000
        if index < 100:
            assert (each.outcome, each.text) == (Outcome.ALLOWED, f"answer {index}")
        else:
            words = f"Here is a better idea, which is number {index}."
            assert (each.outcome, each.text) == (Outcome.REWRITTEN, words)
    assert len(detector.calls) + len(corrector.calls) < 100


def test_a_real_detector_runs_few_times_and_scores_as_it_does_alone(
    make_detector: Callable[..., HarmDetector],
) -> None:
    detector = make_detector()
    answers = [f"an answer with the number {index}" for index in range(64)]
    alone = [detector.score(queries=["a question"], answers=[answer])[0] for answer in answers]
    passes: list[int] = []
    hook = detector.model.register_forward_hook(lambda *_: passes.append(1))

    async def test() -> None:
        async with running(detector, patience_ms=50) as guard:
            scores = [each.score for each in await all_of(guard, answers, rewrite=False)]
        assert scores == pytest.approx(alone, abs=1e-4)

    asyncio.run(test())
    hook.remove()
    assert 1 <= len(passes) <= 16


def test_saved_parts_guard_as_their_protector_does(
    make_detector: Callable[..., HarmDetector], make_detoxifier: Callable[..., Detoxifier], tmp_path: Path
) -> None:
    make_detector().save(tmp_path / "detector")
    make_detoxifier().save(tmp_path / "detoxifier")
    folders = {"detector": str(tmp_path / "detector"), "detoxifier": str(tmp_path / "detoxifier")}
    protector = load(guard_settings(**folders, max_answer_tokens=50))
    answers = ["a short answer", "another answer", 300 * "x"]
    scores = protector.detector.score(queries=3 * ["a question"], answers=answers)
    protector.threshold = max(scores[:2])  # one of the two is flagged
    expected = protector.guard(queries=3 * ["a question"], answers=answers)

    async def test() -> None:
        async with running(protector.detector, protector.corrector, threshold=protector.threshold) as guard:
            guard.worker.queues.protector.max_answer_tokens = 50
            found = await all_of(guard, answers)
        assert [(each.outcome, each.text) for each in found] == [
            (reply.outcome, reply.final) for reply in expected
        ]

    asyncio.run(test())


@scenario
async def test_a_threshold_of_a_request_holds_for_its_rewrite_too() -> None:
    detector = StubDetector(lambda text: 0.4 if "better" in text else 0.6)
    async with running(detector, StubCorrector(), threshold=0.5) as guard:
        outcomes = {
            threshold: (await guard.client.guard("q", "an answer", threshold=threshold)).outcome
            for threshold in (None, 0.7, 0.5, 0.3)
        }
    assert outcomes == {None: "rewritten", 0.7: "allowed", 0.5: "rewritten", 0.3: "refused"}


@scenario
async def test_without_rewriting_a_flagged_answer_is_refused() -> None:
    corrector = StubCorrector()
    async with running(StubDetector(), corrector) as guard:
        found = await guard.client.guard("q", HARMFUL, rewrite=False)
    assert (found.outcome, found.text, found.score) == (Outcome.REFUSED, prompts.REFUSAL, 0.9)
    assert not corrector.calls


@scenario
async def test_a_slow_rewrite_does_not_hold_up_scores() -> None:
    detector, corrector = StubDetector(), StubCorrector()
    async with running(detector, corrector) as guard:
        corrector.gate.clear()
        flagged = asyncio.create_task(guard.client.guard("q", HARMFUL))
        await until(lambda: corrector.calls)
        found = await all_of(guard, 5 * ["a good answer"])
        assert [each.outcome for each in found] == 5 * [Outcome.ALLOWED]
        assert not flagged.done()
        corrector.gate.set()
        assert (await flagged).outcome == Outcome.REWRITTEN
    assert {name.partition("_")[0] for name in detector.threads} == {"scoring"}  # rewrites too


@scenario
async def test_more_requests_than_may_wait_are_told_so_at_once() -> None:
    detector = StubDetector()
    async with running(detector, waiting=4) as guard:
        detector.gate.clear()
        taken = [asyncio.create_task(guard.client.guard("q", "an answer"))]
        await until(lambda: guard.worker.queues.scoring.busy_since)
        taken += [asyncio.create_task(guard.client.guard("q", "an answer")) for _ in range(4)]
        await until(lambda: guard.worker.queues.scoring.waiting == 4)
        started = time.monotonic()
        with pytest.raises(Overloaded) as full:
            await guard.client.guard("q", "one too many")
        assert time.monotonic() - started < 10
        assert 0 < full.value.retry_after <= 60
        detector.gate.set()
        assert [each.outcome for each in await asyncio.gather(*taken)] == 5 * [Outcome.ALLOWED]


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.1, None, "0.1", True])
def test_a_score_that_is_none_is_a_guard_error_and_its_neighbours_get_theirs(score: Any) -> None:
    async def test() -> None:
        detector = StubDetector(lambda text: score if "odd" in text else honest(text))
        async with running(detector, patience_ms=50) as guard:
            odd, good = await all_of(guard, ["an odd answer", "a good answer"])
            assert (odd.outcome, odd.text, odd.score) == (Outcome.GUARD_ERROR, prompts.REFUSAL, None)
            assert (good.outcome, good.text) == (Outcome.ALLOWED, "a good answer")

    asyncio.run(test())


@scenario
async def test_a_text_that_breaks_a_batch_takes_no_neighbour_with_it() -> None:
    def rule(text: str) -> float:
        if "poison" in text:
            raise RuntimeError("out of memory")
        return honest(text)

    detector = StubDetector(rule)
    async with running(detector, patience_ms=100) as guard:
        found = await all_of(guard, ["first", "poison", "second", HARMFUL])
        assert [each.outcome for each in found] == ["allowed", "guard_error", "allowed", "refused"]
        assert detector.calls.count(["poison"]) == 1
        assert (await guard.client.guard("q", "later")).outcome == Outcome.ALLOWED


@scenario
async def test_a_corrector_that_fails_or_writes_nothing_gives_no_raw_answer() -> None:
    def rule(answer: str) -> str:
        if "break" in answer:
            raise RuntimeError("broken")
        return "  "

    async with running(StubDetector(), StubCorrector(rule)) as guard:
        found = await all_of(guard, [f"break {HARMFUL}", HARMFUL])
    assert [each.outcome for each in found] == [Outcome.GUARD_ERROR, Outcome.REFUSED]
    assert {each.text for each in found} == {prompts.REFUSAL}


@scenario
async def test_an_answer_longer_than_the_guard_reads_is_refused_unread() -> None:
    detector = StubDetector()
    async with running(detector, request_mb=0.01) as guard:
        guard.worker.queues.protector.max_answer_tokens = 100
        found = await all_of(guard, [401 * "a", 201 * "ä", 20_000 * "a", 400 * "a"])
        assert [each.outcome for each in found] == 3 * [Outcome.TOO_LONG] + [Outcome.ALLOWED]
        assert {each.text for each in found[:3]} == {prompts.REFUSAL}
    assert detector.calls == [[400 * "a"]]


MALFORMED: list[bytes] = [
    b"nothing",
    b"",
    b"[1]",
    100_000 * b"[",
    b'{"op": "ping"}',
    b'{"id": true, "op": "ping"}',
    b'{"id": 1, "op": "score", "query": "q", "answer": "a", "within": 1}',
    b'{"id": 1, "op": "guard", "query": "q", "within": 1}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": null, "within": 1}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": "a"}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": "a", "within": NaN}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": "a", "within": 1, "threshold": NaN}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": "a", "within": 1, "threshold": 2}',
    b'{"id": 1, "op": "guard", "query": "q", "answer": "a", "within": 1, "rewrite": 1}',
]


@scenario
async def test_a_malformed_line_is_answered_and_its_connection_stays() -> None:
    detector = StubDetector()
    async with running(detector) as guard:
        reader, writer = await asyncio.open_unix_connection(guard.path)
        for line in MALFORMED:
            writer.write(line + b"\n")
            reply = json.loads(await reader.readline())
            assert reply["error"] == "malformed", line
            assert reply["id"] == (1 if b'"id": 1' in line else None), line
        writer.write(b'{"id": 8, "op": "guard", "query": "q", "answer": "\\u2028 a", "within": 9}\n')
        assert json.loads(await reader.readline())["text"] == "\u2028 a"
        writer.close()
    assert detector.calls == [["\u2028 a"]]


@scenario
async def test_a_line_that_is_too_long_ends_its_connection_only() -> None:
    async with running(StubDetector(), request_mb=0.01) as guard:
        reader, writer = await asyncio.open_unix_connection(guard.path)
        writer.write(50_000 * b"x")
        assert await reader.read() == b""
        assert (await guard.client.guard("q", "an answer")).outcome == Outcome.ALLOWED
        assert (await guard.client.guard("q", 50_000 * "x")).outcome == Outcome.TOO_LONG  # it is not sent
        assert guard.client.ready
        writer.close()


@scenario
async def test_texts_of_every_kind_come_back_as_they_were() -> None:
    texts = ["", "line\nbreak\r\n", "\u2028\u2029\x85\x00", "\ud800 alone", "\ud83d\ude00", "😀 ä", '"}{\\']
    async with running(StubDetector()) as guard:
        found = await all_of(guard, texts)
    assert [each.text for each in found] == texts


@scenario
async def test_requests_of_a_client_that_went_away_are_not_computed() -> None:
    detector = StubDetector()
    async with running(detector) as guard:
        detector.gate.clear()
        first = asyncio.create_task(guard.client.guard("q", "first"))
        await until(lambda: detector.calls)
        async with connected(guard.path) as other:
            left = asyncio.create_task(other.guard("q", "left alone"))
            await until(lambda: guard.worker.queues.scoring.waiting == 1)
        with pytest.raises(GuardUnavailable):
            await left
        await until(lambda: len(guard.worker._writers) == 1)  # the worker has noticed
        detector.gate.set()
        assert (await first).outcome == Outcome.ALLOWED
        assert (await guard.client.guard("q", "last")).outcome == Outcome.ALLOWED
    assert detector.calls == [["first"], ["last"]]


@scenario
async def test_a_worker_that_stops_finishes_what_is_under_way_and_refuses_what_is_new() -> None:
    detector, corrector = StubDetector(), StubCorrector()
    async with running(detector, corrector) as guard:
        detector.gate.clear()
        taken = [asyncio.create_task(guard.client.guard("q", text)) for text in ("an answer", HARMFUL)]
        await until(lambda: detector.calls)
        guard.stop.set()
        await until(lambda: guard.worker._stopping)
        with pytest.raises(GuardUnavailable, match="stopping"):
            await guard.client.guard("q", "new")
        assert not guard.serving.done()
        detector.gate.set()
        assert [each.outcome for each in await asyncio.gather(*taken)] == ["allowed", "rewritten"]
        await asyncio.wait_for(guard.serving, 60)
        await until(lambda: not guard.client.ready)
