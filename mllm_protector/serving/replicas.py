"""Servers that do the same: each is asked in its turn, while its answers to a question of ours are right.

They are asked from a thread with an event loop of its own, so that the checks go on whoever waits. No message
holds more of a server's answer than its status.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import httpx

from mllm_protector.errors import InputError, RunError
from mllm_protector.models.connections import checked_address, key_from, public

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_S = 5.0
"""Seconds between two checks of a server."""

CONNECT_S = 2.0
"""The longest that connecting may take."""

AT_ONCE = 16
"""Requests to each server that are under way at once."""

LONGEST = 4_000_000
"""Bytes of an answer."""

OURS = (400, 413, 422)
"""Statuses that blame the request: no other server would take it."""


class ReplicaError(RunError):
    """A server failed, or what it said is not what it was asked for.

    Attributes:
        status: of HTTP, where it said nothing else.
    """

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status


class Ask(Protocol):
    """Posts JSON to a server."""

    async def __call__(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the JSON that comes back.

        Raises:
            ReplicaError: the server fails, or ``read`` raises ``ValueError``, whose words are then quoted.
        """
        ...


class Replica:
    """One server.

    Attributes:
        problem: why it is not used; ``None`` while it is.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, timeout_s: float) -> None:
        self.url = url
        self.problem: str | None = "not checked yet"
        self.doubted = asyncio.Event()
        self._client = client
        self._timeout_s = timeout_s

    async def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """As ``Ask`` says; one try."""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self.url + path, json=body) as answer,
            ):
                if answer.status_code != 200:
                    raise ReplicaError(f"answers with HTTP status {answer.status_code}", answer.status_code)
                content = bytearray()
                async for piece in answer.aiter_bytes():
                    content += piece
                    if len(content) > LONGEST:
                        raise ReplicaError("gives an endless answer")
            return read(json.loads(content))
        except TimeoutError:
            raise ReplicaError(f"gives no answer within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise ReplicaError(f"cannot be reached ({type(error).__name__})") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ReplicaError("gives an answer that is not JSON") from None
        except ValueError as error:
            raise ReplicaError(str(error)) from None
        except (KeyError, IndexError, TypeError):
            raise ReplicaError("gives an answer of another form") from None


class Replicas:
    """Any number of servers that do the same."""

    def __init__(
        self,
        key: str,
        urls: Sequence[str],
        examine: Callable[[Ask], Awaitable[str | None]],
        *,
        timeout_s: float,
        api_key_env: str | None,
        check_s: float = CHECK_S,
    ) -> None:
        """Check all servers, and keep checking them until ``close``.

        Args:
            key: of the config that gave the addresses, for messages.
            urls: what stands in front of each path.
            examine: asks one server something; returns what is wrong with it.
            timeout_s: the longest that one try may take.
            api_key_env: the environment variable with the servers' key; ``None`` sends none.
            check_s: seconds between two checks.

        Raises:
            InputError: not an address, or no key.
            RunError: none of the servers can be used; the message says why.
        """
        if not urls:
            raise InputError(f"{key}: give at least one address")
        try:
            parts = [checked_address(url) for url in urls]
            token = api_key_env and key_from(api_key_env, str(parts[0].hostname))
        except InputError as error:
            raise InputError(f"{key}: {str(error).removeprefix('base_url: ')}") from None
        self.key = key
        self._examine = examine
        self._timeout_s = timeout_s
        self._check_s = check_s
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=key, daemon=True).start()
        self._watching: list[asyncio.Task[None]] = []
        self.run(self._open([public(each) for each in parts], token))
        if all(replica.problem for replica in self.replicas):
            reasons = "; ".join(f"{replica.url} {replica.problem}" for replica in self.replicas)
            self.close()
            raise RunError(f"{key}: no server can be used: {reasons}")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of work that asks servers; called from any thread but ours."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """As ``Ask`` says: of the next server that can be used, and if that fails of one other.

        Raises:
            ReplicaError: the request is refused, both fail, or no server can be used.
        """
        failed = ReplicaError("no server can be used")
        async with self._room:
            for _ in range(2):
                usable = [each for each in self.replicas if each.problem is None]
                if not usable:
                    break
                replica = usable[0]
                self.replicas.remove(replica)  # to the end of the queue
                self.replicas.append(replica)
                try:
                    return await replica.ask(path, body, read)
                except ReplicaError as error:
                    failed = error
                    self._doubt(replica, error)
                    if error.status in OURS:
                        break
        raise ReplicaError(f"{self.key}: {failed}", failed.status)

    def close(self) -> None:
        """Stop the checks and close all connections."""
        self.run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _open(self, urls: Sequence[str], token: str | None) -> None:
        self._room = asyncio.Semaphore(AT_ONCE * len(urls))
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            verify=any(url.startswith("https") for url in urls),  # certificates take long to load
            trust_env=False,  # no proxy and no password from the environment
        )
        self.replicas = [Replica(url, self._client, self._timeout_s) for url in urls]
        await asyncio.gather(*map(self._check, self.replicas))
        self._watching = [self._loop.create_task(self._watch(replica)) for replica in self.replicas]

    async def _shut(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self, replica: Replica) -> None:
        while True:
            try:
                async with asyncio.timeout(self._check_s):
                    await replica.doubted.wait()
            except TimeoutError:
                pass
            replica.doubted.clear()
            await self._check(replica)

    async def _check(self, replica: Replica) -> None:
        try:
            problem = await self._examine(replica.ask)
        except ReplicaError as error:
            problem = str(error)
        if problem is None and replica.problem is not None:
            log.info("%s: %s is used", self.key, replica.url)
        elif problem != replica.problem:
            log.error("%s: %s is not used: it %s", self.key, replica.url, problem)
        replica.problem = problem

    def _doubt(self, replica: Replica, error: ReplicaError) -> None:
        """Have a server that failed checked at once; until then it is used only if it may not be to blame."""
        if error.status in OURS:
            return
        if error.status != 500:  # a text that a server chokes on must not take all of them away
            replica.problem = str(error)
            log.error("%s: %s is not used: it %s", self.key, replica.url, error)
        replica.doubted.set()
