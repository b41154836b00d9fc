"""Streams of the upstream: read to their end, or passed through without the guard by explicit wish (``off``).

``guarded_stream`` has the policies that judge them.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.assembly import Assembly, chunks
from mllm_protector.serving.choices import Unreadable, read_choices
from mllm_protector.serving.judging import Judged
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
    """What an upstream said.

    Attributes:
        headers: for the client.
        assembly: of a stream; ``None`` for any other answer.
        completion: the whole, at its end.
        raw: the events as they came.
    """

    headers: Mapping[str, str]
    assembly: Assembly | None
    completion: dict[str, Any] = field(default_factory=dict)
    raw: bytearray = field(default_factory=bytearray)

    @property
    def stream(self) -> Assembly:
        """The assembly of a stream."""
        if self.assembly is None:
            raise ValueError("an answer that is not a stream")
        return self.assembly


Grown = Callable[[Held, bytes], None]
"""Told of each event that is added to a stream, with its bytes."""


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


async def read(state: State, body: bytes, headers: Mapping[str, str], grown: Grown) -> Held:
    """Read an answer to its end.

    Raises:
        ApiError: the upstream failed.
    """
    started = time.perf_counter()
    async with state.upstream.ask("POST", "/chat/completions", headers, body) as response:
        held = Held(passed_back(response.headers), None)
        if response.headers.get("content-type", "").startswith("application/json"):
            held.completion = state.upstream.completion(await state.upstream.whole(response))
        else:
            held.assembly = Assembly(state.settings.limits.choices)
            await _assemble(state, response, held, grown)
            held.completion = held.assembly.completion()
    state.took("upstream", time.perf_counter() - started)
    return held


def choices_of(state: State, held: Held) -> Sequence[dict[str, Any]]:
    """The choices of a whole answer.

    Raises:
        ApiError: it cannot be read.
    """
    try:
        return read_choices(held.completion, state.settings.limits.choices)
    except Unreadable as error:
        raise state.upstream.fault("malformed", f"the upstream's answer cannot be read: {error}") from None


async def _assemble(state: State, response: httpx.Response, held: Held, grown: Grown) -> None:
    """Read a stream to its end.

    Raises:
        ApiError: it holds an error, is not a stream of chunks, or ends before its choices do.
    """
    frames, assembly, done = Frames(), held.stream, False

    def take(event: Event) -> bool:
        if event.data.strip() == DONE:
            return True
        held.raw.extend(event.raw)
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
        grown(held, event.raw)
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


def _said(state: State, data: str) -> ApiError:
    fault = state.upstream.fault("error", "the upstream failed")
    fault.body = data.encode(errors="replace")
    return fault


def released(
    judged: Judged, assembly: Assembly | None, decimals: int | None, begun: Collection[int] = ()
) -> list[bytes]:
    """The frames of a judged answer; ``begun`` are choices whose beginning was released before."""
    alone = assembly.usage_alone if assembly else True
    null = assembly.usage_null if assembly else False
    found = [*chunks(judged.content, alone=alone, null=null, begun=begun)]
    if decimals is not None:
        ends = [each for each in found if each["choices"]]
        ends[-1]["mllm_protector"] = judged.details(decimals)
    return [frame(json.dumps(each)) for each in found]
