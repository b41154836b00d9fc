"""Questions that a gateway tells before it has the answers, kept in memory for a while."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple


class _Kept(NamedTuple):
    question: str | None
    until: float


class Questions:
    """Bounded: the oldest questions go first. Another front process does not see them."""

    def __init__(
        self,
        *,
        seconds: float = 900.0,
        most: int = 20_000,
        characters: int = 16_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep each question for ``seconds``; at most ``most`` questions of ``characters`` together."""
        self._seconds = seconds
        self._most = most
        self._characters = characters
        self._clock = clock
        self._kept: OrderedDict[tuple[str | None, str], _Kept] = OrderedDict()
        self._size = 0

    def keep(self, key: str | None, call: str, question: str) -> None:
        """Keep the question of a call, by the client with the API key named ``key``.

        Clients of a gateway may choose the call's id: of two questions with one id, neither is believed.
        """
        self._forget()
        known = self._kept.get((key, call))
        if known is not None and known.question != question:
            self._put((key, call), None)
        elif known is None:
            self._put((key, call), question)

    def find(self, key: str | None, call: str) -> str | None:
        """The question of a call, if it is known."""
        self._forget()
        kept = self._kept.get((key, call))
        return kept.question if kept else None

    def _put(self, name: tuple[str | None, str], question: str | None) -> None:
        self._drop(name)
        self._kept[name] = _Kept(question, self._clock() + self._seconds)
        self._size += len(question or "") + len(name[1])
        while self._size > self._characters or len(self._kept) > self._most:
            self._drop(next(iter(self._kept)))

    def _forget(self) -> None:
        now = self._clock()
        while self._kept and (oldest := next(iter(self._kept.items())))[1].until <= now:
            self._drop(oldest[0])

    def _drop(self, name: tuple[str | None, str]) -> None:
        if (kept := self._kept.pop(name, None)) is not None:
            self._size -= len(kept.question or "") + len(name[1])
