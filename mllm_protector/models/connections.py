"""Connections to a server that may be slow, endless or silent: address, key, and an end to each request.

The HTTP library's own time limits hold for each read, so a server that sends a byte a second would keep a
request alive for ever.
"""

import asyncio
import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from anyio.from_thread import start_blocking_portal
from openai import DefaultAsyncHttpxClient, OpenAIError

from mllm_protector.errors import InputError

T = TypeVar("T")

MAX_REPLY_MB = 16
"""Megabytes of a reply, unpacked; no answer of a language model comes near."""

_USUAL_PORTS = {"http": 80, "https": 443}

_TRANSPORT = ("content-encoding", "content-length", "transfer-encoding")
"""Headers that are true only of the bytes on the wire."""


class TooLarge(OpenAIError):
    """A reply of more than ``MAX_REPLY_MB``; the official client raises it and does not ask again."""


class BoundedClient(DefaultAsyncHttpxClient):
    """The official client's connections, where a request with its whole reply ends after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def send(self, request: Any, **settings: Any) -> Any:
        """One request with its whole reply, as in httpx.

        Raises:
            ReadTimeout: of the client's HTTP library (httpx, or httpx2 as of openai 3).
            TooLarge: the reply is longer than ``MAX_REPLY_MB``.
        """
        try:
            async with asyncio.timeout(self._seconds):
                return await self._whole(request, settings | {"stream": True})
        except TimeoutError:
            library = sys.modules[type(request).__module__.partition(".")[0]]
            raise library.ReadTimeout("the whole request took too long", request=request) from None

    async def _whole(self, request: Any, settings: dict[str, Any]) -> Any:
        response = await super().send(request, **settings)
        body = bytearray()
        try:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_REPLY_MB * 1_000_000:
                    raise TooLarge
        finally:
            await response.aclose()
        headers = [pair for pair in response.headers.multi_items() if pair[0] not in _TRANSPORT]
        return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)


def run_in_background(work: Callable[[], Awaitable[T]]) -> T:
    """The outcome of asynchronous work, which an exception in this thread, such as Ctrl-C, cancels at once.

    It runs in its own thread and event loop, so it also works within another loop, as in a notebook.
    """
    with start_blocking_portal() as portal:
        return portal.call(work)


def checked_address(address: str) -> SplitResult:
    """The parts of a base_url. No message shows one that may hold a secret.

    Raises:
        InputError: not an address, or one with a user, a password or a query.
    """
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError("base_url: not an address such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "base_url: must hold no user, password or query; put the key into the environment variable "
            "that api_key_env names"
        )
    return parts


def public(parts: SplitResult) -> str:
    """An address as it may be shown: scheme, host, port and path."""
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    port = "" if parts.port in (None, _USUAL_PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def key_from(variable: str | None, host: str) -> str:
    """The key in an environment variable; a server on this machine needs none.

    Raises:
        InputError: it is not set, or holds something that cannot be a key.
    """
    key = "" if variable is None else os.environ.get(variable, "").strip()
    if not key and variable is not None and not _is_loopback(host):
        raise InputError(
            f"api_key_env={variable}: this environment variable is not set; export {variable}=..., or give "
            "api_key_env=null for a server that wants no key"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"api_key_env={variable}: the value of this environment variable is not a key")
    return key or "none"  # the client insists on one


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
