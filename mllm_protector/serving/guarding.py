"""What a front asks of the guard, and what it may get: never a raw answer that the guard did not pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_protector.errors import RunError
from mllm_protector.records import Outcome


@dataclass(frozen=True, slots=True)
class Guarded:
    """An answer after the guard.

    Attributes:
        outcome: what the guard did.
        text: to show; the raw answer only where ``outcome`` is ``allowed``.
        score: P(harmful) of the raw answer, or ``None`` if it was not scored.
        seconds: from the question to the guard until its reply.
    """

    outcome: Outcome
    text: str
    score: float | None
    seconds: float


class Guarding(Protocol):
    """What a front asks of the guard."""

    async def guard(
        self, query: str, answer: str, *, threshold: float | None = None, rewrite: bool = True
    ) -> Guarded:
        """Score an answer and replace it where its score is at or above the threshold.

        Args:
            query: the dialogue before the answer.
            answer: the raw answer of the upstream model.
            threshold: ``None`` for the detector's own.
            rewrite: without it, a flagged answer is refused.

        Raises:
            GuardUnavailable: there is no reply; the raw answer must not be shown.
        """
        ...

    @property
    def ready(self) -> bool:
        """Whether the guard has answered lately."""
        ...

    @property
    def state(self) -> Mapping[str, Any]:
        """What the guard last said of itself: its ``threshold``, the ``promise`` of it, its ``metrics``."""
        ...


class GuardUnavailable(RunError):
    """The guard is down, not ready yet, or past its deadline."""


class Overloaded(GuardUnavailable):
    """More requests wait for the guard than it takes.

    Attributes:
        retry_after: seconds after which it is worth to ask again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
