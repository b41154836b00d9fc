"""A served model whose replies are bought once: each is on disk before it is used, and never asked for again.

A killed run loses at most the replies under way, of which there are never more than the model's
``concurrency``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_protector.evaluation.store import FAILED, Store
from mllm_protector.files import content_key
from mllm_protector.generation.ledger import STOPPED, Ledger, Ticket, most_tokens
from mllm_protector.models.chat import ServedChat
from mllm_protector.models.metering import NOT_SENT, Usage, complete_metered
from mllm_protector.records import CutText, Failure

Conversation = Sequence[Mapping[str, Any]]


class PaidChat:
    """A served model with a memory and a limit; implements ``protocols.Chat``."""

    def __init__(self, chat: ServedChat, replies: Store, ledger: Ledger, purpose: str) -> None:
        """Bind a model to where its replies and what they take are kept.

        Args:
            chat: is asked for what is missing.
            replies: of all models of this output folder, by content.
            ledger: allows and counts each request.
            purpose: under which it does so.
        """
        self._chat = chat
        self._replies = replies
        self._ledger = ledger
        self._purpose = purpose

    def identity(self) -> dict[str, Any]:
        """The model's own."""
        return self._chat.identity()

    def complete(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        seeds: Sequence[int | None] | None = None,
        keys: Sequence[str] | None = None,
    ) -> list[str | Failure]:
        """The reply to each conversation, or why there is none; failures are tried again by the next run.

        Args:
            conversations: see ``protocols.Chat``.
            max_tokens: the longest reply.
            seeds: see ``ServedChat.complete``.
            keys: what replies are known by, with the model; ``None`` for all that they depend on.

        Raises:
            InputError: as ``ServedChat.complete``.
            RunError: a reply cannot be stored.
        """
        seeds = [None] * len(conversations) if seeds is None else seeds
        parts: Sequence[Any] = (
            [*zip(conversations, seeds, strict=True)] if keys is None else [("named", key) for key in keys]
        )
        # JSON has no tuples: what is the same there has the same key.
        known = [content_key(self._chat.identity(), part, max_tokens) for part in parts]
        wanted = {key: number for number, key in enumerate(known) if key not in self._replies}
        meter = _Meter(
            self._replies,
            self._ledger,
            self._purpose,
            keys=list(wanted),
            most=[most_tokens(conversations[number], max_tokens) for number in wanted.values()],
        )
        chosen_seeds = [seeds[number] for number in wanted.values()]
        made = complete_metered(
            self._chat,
            [conversations[number] for number in wanted.values()],
            max_tokens=max_tokens,
            seeds=chosen_seeds if any(seed is not None for seed in chosen_seeds) else None,
            meter=meter,
        )
        new = dict(zip(wanted, map(self._explained, made), strict=True))
        return [new[key] if key in new else self._stored(key) for key in known]

    def _explained(self, reply: str | Failure) -> str | Failure:
        if reply is not NOT_SENT:
            return reply
        self._ledger.denied = self._ledger.denied or STOPPED  # requests under way were given up
        return Failure(reason=self._ledger.denied)

    def _stored(self, key: str) -> str:
        row = self._replies.get(key) or {}
        return CutText(row["text"]) if row.get("cut") else str(row["text"])


class _Meter:
    """The meter of one call: tickets from the ledger, replies to the store."""

    def __init__(
        self, replies: Store, ledger: Ledger, purpose: str, *, keys: Sequence[str], most: Sequence[int]
    ) -> None:
        self._replies = replies
        self._ledger = ledger
        self._purpose = purpose
        self._keys = keys
        self._most = most
        self._tickets: dict[int, Ticket] = {}

    def stopped(self) -> bool:
        return self._ledger.stopped()

    def admit(self, index: int) -> bool:
        ticket = self._ledger.open(self._purpose, self._most[index])
        if ticket is not None:
            self._tickets[index] = ticket
        return ticket is not None

    def charge(self, index: int, usage: Usage | None) -> None:
        self._ledger.close(self._tickets.pop(index), usage)

    def keep(self, index: int, reply: str | Failure) -> None:
        row: dict[str, Any] = {"key": self._keys[index]}
        if isinstance(reply, Failure):
            row |= {FAILED: reply.reason, "refused": reply.refused}
        else:
            row |= {"text": reply, "cut": isinstance(reply, CutText)}
        self._replies.append([row])
