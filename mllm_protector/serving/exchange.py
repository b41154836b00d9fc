"""What is known of the request under way, for the log, the audit log and traces; it holds no text."""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID = "x-request-id"
"""The header with the id, of requests and answers."""

_GIVEN = re.compile(r"[0-9a-fA-F][0-9a-fA-F-]{15,63}")
"""An id that a client may choose: hexadecimal digits and hyphens, in which nothing can be said."""


@dataclass(slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        id: of this request, in its log lines and in the header ``x-request-id``.
        key: the name of the client's API key.
        model: the name of the upstream's model, if it is a known one.
        outcome: what the guard did, as the header says it.
        error: the code of the error that the client got.
    """

    id: str
    key: str | None = None
    model: str | None = None
    outcome: str | None = None
    error: str | None = None


CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The request that the running code works for."""


def begin(given: str | None) -> Exchange:
    """Start a request; a client's own id is kept if it is one."""
    exchange = Exchange(given if given and _GIVEN.fullmatch(given) else uuid.uuid4().hex)
    CURRENT.set(exchange)
    return exchange


def current() -> Exchange:
    """The request under way; outside of one, a new one that nobody sees."""
    return CURRENT.get() or Exchange(uuid.uuid4().hex)
