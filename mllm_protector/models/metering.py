"""Requests that are allowed and counted one by one, repeats included. Knows nothing of what is asked.

The official client repeats a request by itself, so whoever pays by the call has to stand between it and the
network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from openai import OpenAIError

from mllm_protector.models.connections import BoundedClient
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
    """Watches over one call of ``ServedChat.complete``; called from one thread, which is not the caller's.

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
    """The meter allows no further request; the client hands it on and tries no more."""


class Metered:
    """One conversation on its way."""

    def __init__(self, meter: Meter, index: int) -> None:
        self.sent = False
        self._meter = meter
        self._index = index
        self._open = False

    def begin(self) -> None:
        """Before a request.

        Raises:
            NotAdmitted: it may not be sent.
        """
        if not self._meter.admit(self._index):
            raise NotAdmitted
        self._open = self.sent = True

    def end(self, usage: Usage | None) -> None:
        """After a request, if that was not said before."""
        if self._open:
            self._open = False
            self._meter.charge(self._index, usage)

    def finish(self, reply: str | Failure, usage: Usage | None) -> None:
        """After the last request."""
        if self.sent and reply is not NOT_SENT:
            self._meter.keep(self._index, reply)
        self.end(usage)


_OF_THIS_TASK: ContextVar[Metered | None] = ContextVar("metered", default=None)


@contextmanager
def counted(request: Metered | None) -> Iterator[None]:
    """What this task sends in the meantime is counted, if there is a meter."""
    token = _OF_THIS_TASK.set(request)
    try:
        yield
    finally:
        _OF_THIS_TASK.reset(token)


class MeteredClient(BoundedClient):
    """Connections with a meter for those tasks that have one."""

    async def send(self, request: Any, **settings: Any) -> Any:
        """One request, as in httpx.

        Raises:
            NotAdmitted: the meter does not allow it.
        """
        metered = _OF_THIS_TASK.get()
        if metered is None:
            return await super().send(request, **settings)
        metered.begin()
        try:
            response = await super().send(request, **settings)
        except Exception as error:
            metered.end(NOTHING if type(error).__name__ in _UNREACHED else None)
            raise
        if response.status_code >= 400:  # what comes of a 200, only its reader can tell
            metered.end(NOTHING)
        return response


def usage_of(completion: Any) -> Usage | None:
    """What a server says that a completion took; the client checks no types, so anything may be there."""
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if all(isinstance(count, int) and count >= 0 for count in counts):
        return Usage(prompt=int(counts[0] or 0), completion=int(counts[1] or 0))
    return None
