"""Many connections to one server, in pools that are small.

For each request httpx looks at all pairs of the idle connections of a pool. With 200 of them in one pool that
took three quarters of a front's time.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

LARGEST = 16
"""Connections of a pool."""


class Pools:
    """Clients of httpx with ``connections`` connections together."""

    def __init__(self, connections: int, **settings: Any) -> None:
        """Set them up; nothing is connected. ``settings`` are of ``httpx.AsyncClient``."""
        whole, rest = divmod(connections, LARGEST)
        self._sizes = [LARGEST] * whole + [rest] * (rest > 0)
        self._used = [0] * len(self._sizes)
        self._clients = [
            httpx.AsyncClient(limits=httpx.Limits(max_connections=size), **settings) for size in self._sizes
        ]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client for a request: the first with a free connection, or else that with the shortest queue."""
        free = (place for place, size in enumerate(self._sizes) if self._used[place] < size)
        place = next(free, None)
        if place is None:
            place = min(range(len(self._sizes)), key=lambda each: self._used[each] / self._sizes[each])
        self._used[place] += 1
        try:
            yield self._clients[place]
        finally:
            self._used[place] -= 1

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            await client.aclose()
