"""Streamed answers: held until they are judged (``buffer``), or passed through by explicit wish (``off``).

While an answer is held nothing is sent for a while, so that the upstream's errors and the verdict can still
be said in status and headers. Then comments keep the connection open, and the header says ``pending``.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import httpx

from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.assembly import Assembly, chunks
from mllm_protector.serving.choices import Unreadable, read_choices
from mllm_protector.serving.judging import Case, Judged, judge
from mllm_protector.serving.sending import OUTCOME, Sender
from mllm_protector.serving.sse import DONE, Event, Frames, frame
from mllm_protector.serving.state import State
from mllm_protector.serving.upstream import passed_back

AFTER_DONE_S = 0.05
"""How long the end of an answer is waited for behind its last event."""

UNGUARDED = "unguarded"
"""The outcome in the header of a stream without a verdict."""


@dataclass(slots=True)
class Held:
    """What an upstream said, whole.

    Attributes:
        assembly: of a stream; ``None`` for an answer that is none.
        raw: the events as they came.
        headers: for the client.
    """

    completion: dict[str, object]
    assembly: Assembly | None
    raw: bytes
    headers: Mapping[str, str]


async def buffered(
    state: State, body: bytes, headers: Mapping[str, str], case: Case, sender: Sender, decimals: int | None
) -> None:
    """Hold the whole answer, judge it, then release it as a stream.

    Args:
        state: of the front.
        body: for the upstream.
        headers: of the client.
        case: how the answer is judged.
        sender: the way to the client.
        decimals: of the scores that the client asked to see; ``None`` if it did not ask.

    Raises:
        ApiError: the upstream or the guard failed.
    """
    work = asyncio.ensure_future(_hold_and_judge(state, body, headers, case))
    try:
        while not (await asyncio.wait({work}, timeout=state.settings.policy.ping_s))[0]:
            await sender.ping({})
        held, judged = work.result()
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError, ApiError):
            await work
    given = {**held.headers, OUTCOME: judged.header}
    if judged.shadow and held.assembly is not None:
        unjudged = any(each.outcome is Outcome.GUARD_ERROR for each in judged.verdicts)
        state.released(len(held.raw), unscanned=unjudged)
        await sender.events(held.raw + frame(DONE), given)
    else:
        for piece in _release(judged, held.assembly, decimals):
            state.released(len(piece))
            await sender.events(piece, given)
        await sender.events(frame(DONE), given)
    await sender.end()


async def unguarded(state: State, body: bytes, headers: Mapping[str, str], sender: Sender) -> None:
    """Pass a stream through, event by event, and count its bytes as not judged.

    Raises:
        ApiError: the upstream failed.
    """
    async with state.upstream.ask("POST", "/chat/completions", headers, body) as response:
        given = {**passed_back(response.headers), OUTCOME: UNGUARDED}
        frames, done = Frames(), False
        async for piece in state.upstream.pieces(response):
            for event in frames.feed(piece):
                done = done or event.data.strip() == DONE
                state.released(len(event.raw), unscanned=True)
                await sender.events(event.raw, given)
        if (last := frames.end()) is not None:
            done = done or last.data.strip() == DONE
            state.released(len(last.raw), unscanned=True)
            await sender.events(last.raw, given)
        if not done:
            await sender.events(frame(DONE), given)
    await sender.end()


async def _hold_and_judge(
    state: State, body: bytes, headers: Mapping[str, str], case: Case
) -> tuple[Held, Judged]:
    started = time.perf_counter()
    async with state.upstream.ask("POST", "/chat/completions", headers, body) as response:
        kind = response.headers.get("content-type", "")
        if kind.startswith("application/json"):
            held = _whole(state, await state.upstream.whole(response), response)
        else:
            held = await _assembled(state, response)
    state.took("upstream", time.perf_counter() - started)
    try:
        choices = read_choices(held.completion, state.settings.limits.choices)
    except Unreadable as error:
        raise state.upstream.fault("malformed", f"the upstream's answer cannot be read: {error}") from None
    return held, await state.judged(judge(held.completion, choices, case, state.guard, state.settings.policy))


def _whole(state: State, body: bytes, response: httpx.Response) -> Held:
    return Held(state.upstream.completion(body), None, body, passed_back(response.headers))


async def _assembled(state: State, response: httpx.Response) -> Held:
    """Read a stream to its end.

    Raises:
        ApiError: it holds an error, is no stream of chunks, or ends before its choices do.
    """
    frames, assembly, raw, done = Frames(), Assembly(state.settings.limits.choices), bytearray(), False

    def take(event: Event) -> bool:
        if event.data.strip() == DONE:
            return True
        raw.extend(event.raw)
        try:
            chunk = json.loads(event.data)
            if isinstance(chunk, dict) and chunk.get("error"):
                raise _said(state, event.data)
            assembly.add(chunk)
        except (ValueError, RecursionError):
            raise state.upstream.fault("malformed", "the upstream's stream holds no JSON") from None
        except Unreadable as error:
            message = f"the upstream's stream cannot be read: {error}"
            raise state.upstream.fault("malformed", message) from None
        return False

    pieces = state.upstream.pieces(response)
    async for piece in pieces:
        for event in frames.feed(piece):
            done = done or take(event)
        if done:
            break
    if done:  # a connection that is read to its end can be used again
        with suppress(TimeoutError, ApiError, httpx.HTTPError):
            async with asyncio.timeout(AFTER_DONE_S):
                async for _ in pieces:
                    pass
    if not done and (last := frames.end()) is not None:
        done = take(last)
    if not (assembly.is_finished or (done and assembly.has_choices)):
        raise state.upstream.fault("cut", "the upstream's answer broke off")
    return Held(assembly.completion(), assembly, bytes(raw), passed_back(response.headers))


def _said(state: State, data: str) -> ApiError:
    fault = state.upstream.fault("error", "the upstream failed")
    fault.body = data.encode(errors="replace")
    return fault


def _release(judged: Judged, assembly: Assembly | None, decimals: int | None) -> list[bytes]:
    alone = assembly.usage_alone if assembly else True
    null = assembly.usage_null if assembly else False
    found = [*chunks(judged.content, alone=alone, null=null)]
    if decimals is not None:
        ends = [each for each in found if each["choices"]]
        ends[-1]["mllm_protector"] = judged.details(decimals)
    return [frame(json.dumps(each)) for each in found]
