"""The server that is guarded, over httpx. Its address is the one of the config, whatever a client sends."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from mllm_protector.errors import InputError
from mllm_protector.serving.api_errors import ApiError
from mllm_protector.serving.choices import json_object
from mllm_protector.serving.exchange import REQUEST_ID, current
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.pools import Pools
from mllm_protector.serving.settings import MEGABYTE, FrontSettings
from mllm_protector.serving.tracing import Tracing

PASSED_ON = (
    "openai-organization",
    "openai-project",
    "user-agent",
    "traceparent",
    "tracestate",
)
"""Of a client's headers; all others stay here."""

PASSED_BACK = ("openai-processing-ms", "openai-version", "retry-after", "retry-after-ms")
"""Of the upstream's headers, beside those of its rate limits."""

UPSTREAM_ID = "x-upstream-request-id"
"""The upstream's own id of a request; ``x-request-id`` is ours."""

AWAY = (502, 503, 504)
"""Statuses that say that nobody answers; ``transformers serve`` has 500 for its list of models at times."""

REACHED_S = 2.0
"""The longest that ``reachable`` waits."""

OTHER = "other"
"""Stands for the name of a model that is not known."""

MOST_NAMES = 1000
_NAME = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)


class ModelNames:
    """The names of models that may stand in logs: those that the upstream lists, and those of the config.

    A client can write anything as the name of a model, so its words are only repeated where they are known.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, configured: Iterable[str]) -> None:
        """Take over the names in a config."""
        self._names |= {*configured}

    def learn(self, listed: bytes) -> None:
        """Take over the names in an upstream's answer to ``GET /v1/models``; anything else is ignored."""
        data = (json_object(listed) or {}).get("data")
        for each in data if isinstance(data, list) else []:
            name = each.get("id") if isinstance(each, dict) else None
            if isinstance(name, str) and _NAME.fullmatch(name) and len(self._names) < MOST_NAMES:
                self._names.add(name)

    def known(self, name: str) -> str:
        """The name itself, or ``other``."""
        return name if name in self._names else OTHER


class Upstream:
    """Asks the upstream; every failure is an ``ApiError`` for the client."""

    def __init__(self, settings: FrontSettings, metrics: Metrics, tracing: Tracing) -> None:
        """Bind to the address; nothing is sent.

        Raises:
            InputError: the environment variable of its key is not set.
        """
        self.settings = settings.upstream
        self.metrics = metrics
        self.names = ModelNames()
        self._tracing = tracing
        self.apply(settings)
        self._key: str | None = None
        if name := self.settings.api_key_env:
            self._key = os.environ.get(name)
            if not self._key:
                raise InputError(f"upstream.api_key_env={name}: this environment variable is not set")
        times = httpx.Timeout(
            self.settings.read_s, connect=self.settings.connect_s, pool=self.settings.connect_s
        )
        safe = self.settings.url.startswith("https")
        self._pools = Pools(
            self.settings.connections,
            timeout=times,
            verify=httpx.create_ssl_context() if safe else False,  # certificates take long to load
            trust_env=False,  # no proxy and no password from the environment
            follow_redirects=False,
        )

    def apply(self, settings: FrontSettings) -> None:
        """Take over what other settings say of limits, keys and models; address and times stay."""
        self.names.add(settings.policy.model_thresholds)
        self.most = int(settings.limits.answer_mb * MEGABYTE)
        self._keeps_keys = bool(settings.keys)

    async def close(self) -> None:
        """Close all connections."""
        await self._pools.close()

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The upstream's answer, of status 200, to be read within the block; leaving the block cancels it.

        Args:
            method: of HTTP.
            path: our own words, behind the address.
            headers: of the client.
            body: JSON.

        Raises:
            ApiError: there is no such answer, or it takes too long.
        """
        try:
            with self._tracing.part("upstream") as traced:
                sent = self._headers(headers) | traced
                async with (
                    self._pools.client() as client,
                    asyncio.timeout(self.settings.total_s),
                    client.stream(method, self.settings.url + path, content=body, headers=sent) as response,
                ):
                    if response.status_code != 200:
                        raise await self._refused(response)
                    yield response
        except (TimeoutError, httpx.TimeoutException, httpx.HTTPError, httpx.StreamError) as error:
            raise self._failed(error) from None

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            ApiError: it is longer than an answer may be.
        """
        size = 0
        async for piece in response.aiter_bytes():
            size += len(piece)
            if size > self.most:
                raise self.fault("too_long", "the upstream's answer is too long")
            yield piece

    async def whole(self, response: httpx.Response) -> bytes:
        """The whole body.

        Raises:
            ApiError: it is longer than an answer may be.
        """
        return b"".join([piece async for piece in self.pieces(response)])

    def completion(self, body: bytes) -> dict[str, Any]:
        """A body as the JSON object that it is.

        Raises:
            ApiError: it is not one, or holds nothing but an error.
        """
        content = json_object(body)
        if content is None:
            raise self.fault("malformed", "the upstream's answer is not a JSON object")
        if content.get("error") and not content.get("choices"):
            fault = self.fault("error", "the upstream failed")
            fault.body = body
            raise fault
        return content

    async def reachable(self, headers: Mapping[str, str]) -> bool:
        """Whether the upstream answers at all."""
        try:
            async with asyncio.timeout(REACHED_S), self._pools.client() as client:
                answer = await client.get(self.settings.url + "/models", headers=self._headers(headers))
        except (TimeoutError, httpx.HTTPError):
            return False
        if answer.status_code == 200:
            self.names.learn(answer.content)
        return answer.status_code not in AWAY

    def fault(self, kind: str, message: str, status: int = 502) -> ApiError:
        """A failure of the upstream, counted by its kind."""
        self.metrics.upstream_errors.labels(kind).inc()
        return ApiError(status, message, code=f"upstream_{kind}")

    def _headers(self, given: Mapping[str, str]) -> dict[str, str]:
        headers = {name: given[name] for name in PASSED_ON if name in given}
        headers |= {
            "content-type": "application/json",
            "accept-encoding": "identity",
            REQUEST_ID: current().id,
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        elif "authorization" in given and not self._keeps_keys:
            headers["authorization"] = given["authorization"]
        return headers

    async def _refused(self, response: httpx.Response) -> ApiError:
        """An answer of another status than 200, passed on if it is an error."""
        status = response.status_code
        self.metrics.upstream_errors.labels(f"status_{status // 100}xx").inc()
        if status < 400:
            return ApiError(502, f"the upstream answered with status {status}", code="upstream_status")
        body = await self.whole(response)
        headers = passed_back(response.headers)
        message = f"the upstream answered with status {status}"
        if "choices" in (json_object(body) or {}):
            return ApiError(status, f"{message} and an answer", code="upstream_status", headers=headers)
        headers["content-type"] = response.headers.get("content-type", "application/json")
        return ApiError(status, message, code="upstream_status", body=body, headers=headers)

    def _failed(self, error: Exception) -> ApiError:
        if isinstance(error, httpx.PoolTimeout):
            overloaded = self.fault("busy", "too many requests to the upstream are under way", 503)
            overloaded.headers["retry-after"] = "1"
            return overloaded
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return self.fault("timeout", "the upstream took too long", 504)
        if isinstance(error, httpx.ConnectError):
            return self.fault("unreachable", "the upstream cannot be reached")
        return self.fault("cut", "the upstream's answer broke off")


def passed_back(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an upstream's answer that a client gets."""
    kept = {name: value for name, value in headers.items() if name.lower() in PASSED_BACK}
    if REQUEST_ID in headers:
        kept[UPSTREAM_ID] = headers[REQUEST_ID]
    return kept | {name: value for name, value in headers.items() if name.startswith("x-ratelimit-")}
