"""Streamed answers that are judged: held until the end (``buffer``), or released piece by piece (``window``).

While an answer is held nothing is sent for a while, so that the upstream's errors and the verdict can still
be said in status and headers. Then comments keep the connection open, and the header says ``pending``.

In windows each choice is judged on its own, one prefix at a time, while the upstream is read on; what arrives
meanwhile is in the next prefix. So a slow guard makes the steps longer, and never lets anything pass. What is
read ahead is bounded as a held answer is (``limits.answer_mb``).

Released in pieces are texts alone. Tool calls and log probabilities wait for the verdict on the whole answer.
A choice of which nothing is out is then judged as a held one and may be rewritten; of one that has begun the
rest follows, or a refusal.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mllm_protector.guard.windows import Windows
from mllm_protector.records import Outcome
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.assembly import some_chunks
from mllm_protector.serving.chat import ChatRequest
from mllm_protector.serving.choices import TEXT_FIELDS
from mllm_protector.serving.guarding import Guarded
from mllm_protector.serving.judging import SHOWN, Case, Judged, guard_failed, judge, verdict
from mllm_protector.serving.sending import OUTCOME, PENDING, Sender
from mllm_protector.serving.sse import DONE, frame
from mllm_protector.serving.state import State
from mllm_protector.serving.streaming import Held, choices_of, read, released


class Piece(NamedTuple):
    """Frames to send, and the headers if they are the first ones."""

    raw: bytes
    headers: Mapping[str, str]
    unscanned: bool = False


@dataclass(slots=True)
class Growing:
    """A choice so far.

    Attributes:
        windows: when it is judged and cut.
        shown: its texts that are out, by their field.
        cut: the verdict that ended it.
        judging: the verdict that is under way.
    """

    windows: Windows
    shown: Mapping[str, str] = field(default_factory=dict)
    cut: Guarded | None = None
    judging: asyncio.Task[None] | None = None


async def guarded_stream(
    state: State,
    request: ChatRequest,
    headers: Mapping[str, str],
    case: Case,
    sender: Sender,
    decimals: int | None,
) -> None:
    """Release an answer as far as the guard lets it.

    With ``window``, shadow mode passes every event at once and counts it as not judged.

    Args:
        state: of the front.
        request: what was asked.
        headers: of the client.
        case: how the answer is judged.
        sender: the way to the client.
        decimals: of the scores that the client asked to see; ``None`` if it did not ask.

    Raises:
        ApiError: the upstream or the guard failed.
    """
    started, first = time.perf_counter(), True
    stream = _Stream(state, case, request.choices, decimals)
    work = asyncio.ensure_future(stream.run(request.body, headers))
    try:
        while True:
            try:
                async with asyncio.timeout(state.settings.policy.ping_s):
                    piece = await stream.out.get()
            except TimeoutError:
                await sender.ping({})
                continue
            if piece is None:
                break
            if first:
                state.took("first_byte", time.perf_counter() - started)
                first = False
            state.released(len(piece.raw), unscanned=piece.unscanned)
            await sender.events(piece.raw, piece.headers)
        await work
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError, ApiError):
            await work
    await sender.events(frame(DONE), {})
    await sender.end()


class _Stream:
    """One answer on its way; ``out`` gets what is to be sent, and ``None`` at the end."""

    def __init__(self, state: State, case: Case, wanted: int, decimals: int | None) -> None:
        self.out: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._state = state
        self._policy = state.settings.policy
        self._case = case
        self._wanted = wanted
        self._decimals = decimals
        # Half of a JSON answer is useless.
        self._in_windows = self._policy.streaming == "window" and not case.structured
        self._choices: dict[int, Growing] = {}
        self._ended: asyncio.Future[Held | ApiError] = asyncio.get_running_loop().create_future()

    async def run(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Read, judge and release.

        Raises:
            ApiError: the upstream or the guard failed.
        """
        reading = asyncio.ensure_future(read(self._state, body, headers, self._grown))
        try:
            either: set[asyncio.Future[Any]] = {reading, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            held = self._ended.result() if self._ended.done() else reading.result()
            await self._stop(reading)
            if isinstance(held, ApiError):
                raise held
            await self._finish(held)
        finally:
            await self._stop(reading)
            self.out.put_nowait(None)

    async def _stop(self, reading: asyncio.Task[Held]) -> None:
        tasks = [reading, *(each.judging for each in self._choices.values() if each.judging)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _grown(self, held: Held, raw: bytes) -> None:
        """Begin the verdicts that are due, now that an event was added."""
        if not self._in_windows:
            return
        if self._policy.shadow:
            given = {**held.headers, OUTCOME: f"shadow-{PENDING}"}
            self.out.put_nowait(Piece(raw, given, unscanned=True))
        for index, size in held.stream.sizes.items():
            if index not in self._choices:
                windows = Windows(tokens=self._policy.window_tokens, hits=self._policy.window_hits)
                self._choices[index] = Growing(windows)
            choice = self._choices[index]
            if choice.judging is None and choice.windows.is_due(size):
                choice.judging = asyncio.ensure_future(self._judge(held, index, choice))

    async def _judge(self, held: Held, index: int, choice: Growing) -> None:
        """Judge a choice as far as it came, as long as enough comes."""
        while choice.windows.is_due(size := held.stream.sizes[index]):
            texts = held.stream.texts(index)
            made = await verdict(texts, self._case, self._state.guard, rewrite=False, busy_fails=True)
            self._state.took("window", made.seconds)
            passed = made.outcome is Outcome.ALLOWED
            choice.windows.judged(size, passed=passed)
            if passed and not self._policy.shadow:
                self._show(held, index, choice, texts)
            elif choice.windows.is_cut:
                self._cut(held, choice, made)
        choice.judging = None

    def _show(self, held: Held, index: int, choice: Growing, texts: Mapping[str, str]) -> None:
        given = {**held.headers, OUTCOME: PENDING}
        more, assembly = _behind(texts, choice.shown), held.stream
        for each in some_chunks(
            assembly.top, index, more, null=assembly.usage_null, begun=bool(choice.shown)
        ):
            self.out.put_nowait(Piece(frame(json.dumps(each)), given))
        choice.shown = texts

    def _cut(self, held: Held, choice: Growing, made: Guarded) -> None:
        choice.cut = made
        self._count(made)
        if self._policy.shadow or self._ended.done():
            return
        if self._policy.on_error == "error" and made.outcome is Outcome.GUARD_ERROR:
            self._ended.set_result(guard_failed())
        elif sum(each.cut is not None for each in self._choices.values()) >= self._wanted:
            held.completion = held.stream.completion()
            self._ended.set_result(held)  # nothing more of the upstream is wanted

    def _count(self, made: Guarded) -> None:
        mode = "shadow" if self._policy.shadow else "enforce"
        self._state.metrics.stream_cuts.labels(SHOWN[made.outcome], mode).inc()

    async def _finish(self, held: Held) -> None:
        """Judge the whole, and release what is left."""
        judged = await self._state.judged(self._judged(held))
        if judged.shadow and held.assembly is not None:
            if not self._in_windows:
                unjudged = any(each.outcome is Outcome.GUARD_ERROR for each in judged.verdicts)
                given = {**held.headers, OUTCOME: judged.header}
                self.out.put_nowait(Piece(bytes(held.raw), given, unjudged))
            return
        begun = {index for index, choice in self._choices.items() if choice.shown}
        judged = replace(judged, content={**judged.content, "choices": self._left(judged)})
        decimals = self._decimals
        if begun and decimals is None:
            decimals = 0  # the header is out, so the last chunk says what was done
        given = {**held.headers, OUTCOME: judged.header}
        for raw in released(judged, held.assembly, decimals, begun):
            self.out.put_nowait(Piece(raw, given))

    async def _judged(self, held: Held) -> Judged:
        """All that the client gets to see, with what is out already."""
        raw, known = choices_of(self._state, held), self._choices.items()
        shown = {index: each.shown.get("content", "") for index, each in known if each.windows.shown}
        cut = {index: each.cut for index, each in known if each.cut is not None}
        guard, policy = self._state.guard, self._policy
        judged = await judge(held.completion, raw, self._case, guard, policy, shown=shown, cut=cut)
        for choice, made in zip(raw, judged.verdicts, strict=True):
            late = choice.get("index", 0) in shown.keys() - cut.keys()
            if late and made.outcome is not Outcome.ALLOWED:
                self._count(made)
        return judged

    def _left(self, judged: Judged) -> list[dict[str, Any]]:
        """The choices without the words that are out."""
        choices = []
        for choice in judged.content["choices"]:
            known = self._choices.get(choice.get("index", 0))
            message = choice["message"]
            if known is not None and known.shown:
                message = {**message, **_behind(message, known.shown)}
            choices.append({**choice, "message": message})
        return choices


def _behind(texts: Mapping[str, Any], shown: Mapping[str, str]) -> dict[str, str]:
    """Of each text what is not shown yet."""
    return {name: texts[name][len(shown.get(name, "")) :] for name in TEXT_FIELDS if texts.get(name)}
