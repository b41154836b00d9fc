"""Streams for windows of 16 bytes, which is also the size of a piece.

The upstream sends a piece when the guard has been asked about the one before, so that nothing hangs on the
speed of the machine.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from mllm_protector.prompts import REFUSAL
from mllm_protector.serving.settings import FrontSettings
from tests.serving.fakes import DONE, HARMFUL, Piece, Said, WordGuard, chunk, stream
from tests.serving.test_proxy import to

END = chunk({}, end="stop")
CUT_OFF = f"\n\n{REFUSAL}"


def part(word: str) -> str:
    """A word in a piece of 16 bytes."""
    return word.ljust(16, "_")


A, B, C, BAD = map(part, ("one", "two", "three", HARMFUL))


def windows(**policy: Any) -> Callable[[str], FrontSettings]:
    policy = {"streaming": "window", "window_tokens": 4, "window_hits": 2} | policy
    return lambda url: to(url, policy=policy)


def asked_for(guard: WordGuard, count: int) -> Callable[[], None]:
    """Wait until the guard has been asked so often, or the front must have gone on without it."""

    def wait() -> None:
        end = time.monotonic() + 20
        while len(guard.asked) < count and time.monotonic() < end:
            time.sleep(0.002)

    return wait


def spoken(text: str) -> bytes:
    """A chunk with the log probability of its text."""
    event = json.loads(chunk({"content": text}).removeprefix(b"data: "))
    event["choices"][0]["logprobs"] = {"content": [{"token": text}]}
    return b"data: %s\n\n" % json.dumps(event).encode()


def paced(guard: WordGuard, *texts: str, last: tuple[Piece, ...] = (END, DONE)) -> Said:
    """A stream of texts, each of which is sent when the one before was judged; shorter ones never are."""
    pieces: list[Piece] = []
    for count, text in enumerate(texts, 1):
        pieces.append(spoken(text))
        if len(text) == len(A):
            pieces.append(asked_for(guard, count))
    return stream(*pieces, *last)


def outcome(events: list[Any]) -> Any:
    return events[-1]["mllm_protector"]["outcome"]
