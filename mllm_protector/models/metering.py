"""Requests of a served model that are allowed and counted one by one, repeats included, for ``generation``.

The official client repeats a request by itself, so whoever pays by the call has to stand between it and the
network.
"""

import asyncio
import json
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from openai import OpenAIError

from mllm_protector.models.chat import Conversation, ServedChat
from mllm_protector.models.connections import BoundedClient, run_in_background
from mllm_protector.records import Failure

NOT_SENT = Failure(reason="not sent")
"""How a conversation ends if its meter allowed no (further) request, or the run was stopped meanwhile."""

GRACE_SECONDS = 2.0
"""Requests under way are paid for, so a run that is stopped lets those that end soon come home."""

_UNREACHED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
"""Nothing was sent. By name, because the client has changed its HTTP library once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The tokens that a server counted for one request."""

    prompt: int
    completion: int


NOTHING = Usage(prompt=0, completion=0)


class Meter(Protocol):
    """Watches over one call of ``complete_metered``, from one thread, which is not the caller's.

    The index is that of the conversation.
    """

    def stopped(self) -> bool:
        """Whether the run shall end: what is under way then has ``GRACE_SECONDS``."""
        ...

    def admit(self, index: int) -> bool:
        """Whether one more request may be sent now; a repeat is one more."""
        ...

    def charge(self, index: int, usage: Usage | None) -> None:
        """A request that was admitted has ended; ``None`` if nobody knows what it took."""
        ...

    def keep(self, index: int, reply: str | Failure) -> None:
        """How a conversation that was sent ends; a reply is kept before its request is charged."""
        ...


class NotAdmitted(OpenAIError):
    """The meter allows no further request; the client raises it and tries no more."""


class _Metered:
    """One conversation on its way."""

    def __init__(self, meter: Meter, index: int) -> None:
        self.meter = meter
        self.index = index
        self.sent = self.denied = self.open = False
        self.usage: Usage | None = None

    def begin(self) -> None:
        if not self.meter.admit(self.index):
            self.denied = True
            raise NotAdmitted
        self.open = self.sent = True

    def end(self, usage: Usage | None) -> None:
        if self.open:
            self.open = False
            self.meter.charge(self.index, usage)


_OF_THIS_TASK: ContextVar[_Metered] = ContextVar("metered")


class MeteredClient(BoundedClient):
    """Connections whose requests are metered."""

    async def send(self, request: Any, **settings: Any) -> Any:
        """One request, as in httpx.

        Raises:
            NotAdmitted: the meter does not allow it.
        """
        metered = _OF_THIS_TASK.get()
        metered.begin()
        try:
            response = await super().send(request, **settings)
        except Exception as error:
            metered.end(NOTHING if type(error).__name__ in _UNREACHED else None)
            raise
        if response.status_code >= 400:
            metered.end(NOTHING)
        else:
            metered.usage = _usage(response.content)
        return response


def complete_metered(
    chat: ServedChat,
    conversations: Sequence[Conversation],
    *,
    max_tokens: int,
    seeds: Sequence[int | None] | None,
    meter: Meter,
) -> list[str | Failure]:
    """``ServedChat.complete`` under a meter, which allows, counts and keeps each request and reply.

    Raises:
        InputError: as ``ServedChat.complete``.
        RunError: as ``ServedChat.complete``.
    """
    seeds = [chat.seed] * len(conversations) if seeds is None else seeds
    rows = [*zip(conversations, seeds, strict=True)]
    replies: dict[int, str | Failure] = {}

    async def ask_all() -> list[str | Failure]:
        client = chat._client(MeteredClient(chat._timeout))

        async def ask(index: int) -> str | Failure:
            metered = _Metered(meter, index)
            _OF_THIS_TASK.set(metered)
            try:
                reply = await chat._reply(client, *rows[index], max_tokens)
                replies[index] = NOT_SENT if metered.denied else reply
                if metered.sent and not metered.denied:
                    meter.keep(index, reply)
            finally:
                metered.end(metered.usage)
            return replies[index]

        async with client:
            asking = asyncio.ensure_future(chat._in_turn(len(rows), ask))
            while not (meter.stopped() or asking.done()):
                await asyncio.wait([asking], timeout=0.1)
            if not (await asyncio.wait([asking], timeout=GRACE_SECONDS))[0]:
                asking.cancel()
                await asyncio.wait([asking])
                return [replies.get(index, NOT_SENT) for index in range(len(rows))]
            return asking.result()

    return run_in_background(ask_all) if rows else []


def _usage(body: bytes) -> Usage | None:
    """What a server says that a completion took; anything may stand there."""
    try:
        usage = json.loads(body)["usage"]
        counts = [usage["prompt_tokens"], usage["completion_tokens"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    if all(isinstance(count, int) and count >= 0 for count in counts):
        return Usage(prompt=counts[0], completion=counts[1])
    return None
