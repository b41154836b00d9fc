"""The routes of a front: an OpenAI-compatible address whose answers are guarded.

Pure ASGI: each request watches its client, and work for a client that left is cancelled. Whatever is not
listed here is denied, because another route of the upstream would answer without the guard.
"""

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Receive

from mllm_protector.records import Outcome
from mllm_protector.serving import metrics as counting
from mllm_protector.serving.api_errors import ApiError, bad_request
from mllm_protector.serving.audit import AuditLog
from mllm_protector.serving.chat import read_request
from mllm_protector.serving.choices import Unreadable, json_object, read_choices
from mllm_protector.serving.endpoint import Answer, Endpoint
from mllm_protector.serving.exchange import current
from mllm_protector.serving.gateways import litellm, moderations, webhook
from mllm_protector.serving.gateways.asking import Asking
from mllm_protector.serving.gateways.questions import Questions
from mllm_protector.serving.guarded_stream import guarded_stream
from mllm_protector.serving.guarding import Guarding
from mllm_protector.serving.judging import Case, judge
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.page import page
from mllm_protector.serving.sending import OUTCOME, Sender, read_body, while_connected
from mllm_protector.serving.settings import MEGABYTE, FrontSettings
from mllm_protector.serving.state import State
from mllm_protector.serving.streaming import UNGUARDED, unguarded
from mllm_protector.serving.tracing import Tracing, configured
from mllm_protector.serving.upstream import Upstream, passed_back

log = logging.getLogger(__name__)

DETAILS = "x-mllm-protector-details"
Work = Callable[[Headers, bytes, str | None, Sender], Coroutine[Any, Any, None]]
"""Answers a client: its headers, its body, the name of its key, and the way to it."""

Translate = Callable[[dict[str, Any], Asking], Awaitable[dict[str, Any]]]
GATEWAYS: Mapping[str, Translate] = MappingProxyType(
    {
        "/beta/litellm_basic_guardrail_api": litellm.answer,
        "/v1/moderations": moderations.answer,
        "/request": webhook.on_request,
        "/response": webhook.on_response,
    }
)
"""What speaks the protocols of other gateways: POST with a JSON object, answered with one."""

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
SERVED = (
    f"POST {CHAT}, GET {MODELS}, GET /, GET /state, GET /health, GET /ready, GET /metrics, "
    f"POST {', POST '.join(GATEWAYS)}"
)


class Front:
    """Answers clients.

    Attributes:
        state: its parts.
    """

    def __init__(self, settings: FrontSettings, guard: Guarding, tracing: Tracing | None = None) -> None:
        """Bind the parts; nothing is sent. ``tracing`` is as the environment says if it is not given.

        Raises:
            InputError: an environment variable is not set, or the audit log cannot be opened.
        """
        metrics = Metrics()
        tracing = tracing or configured()
        upstream = Upstream(settings, metrics, tracing)
        audit = AuditLog(settings.audit, metrics.audit_errors) if settings.audit else None
        self.state = State(settings, guard, upstream, metrics, tracing, audit)
        self._under_way = 0
        self._questions = Questions()

    def apply(self, settings: FrontSettings) -> None:
        """Go by other settings from now on; those of the upstream stay."""
        self.state.settings = settings
        self.state.upstream.apply(settings)

    def app(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await self.state.close()

        table: tuple[tuple[str, str, Answer], ...] = (
            (CHAT, "POST", self._for_clients(self._chat)),
            (MODELS, "GET", self._for_clients(self._models, "GET")),
            ("/", "GET", self._page),
            ("/state", "GET", self._state),
            ("/health", "GET", self._health),
            ("/ready", "GET", self._ready),
            ("/metrics", "GET", self._metrics),
            *(
                (path, "POST", self._for_clients(partial(self._gateway, each)))
                for path, each in GATEWAYS.items()
            ),
        )
        endpoint = partial(Endpoint, self.state, SERVED)
        routes = [Route(path, endpoint(path, answer, method)) for path, method, answer in table]
        app = Starlette(routes=routes, lifespan=lifespan)
        app.router.redirect_slashes = False
        app.router.default = endpoint("other", None, "")
        return app

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among the requests under way.

        Raises:
            ApiError: there are too many.
        """
        if self._under_way >= self.state.settings.limits.requests:
            message = "too many requests are under way; ask again later"
            raise ApiError(503, message, code="overloaded", retry_after="1")
        self._under_way += 1
        self.state.metrics.under_way.inc()
        try:
            yield
        finally:
            self._under_way -= 1
            self.state.metrics.under_way.dec()

    def _key(self, headers: Headers) -> str | None:
        """The name of the client's key; ``None`` where no keys are configured.

        Raises:
            ApiError: the key is missing or unknown.
        """
        settings = self.state.settings
        if not settings.keys:
            return None
        kind, _, secret = headers.get("authorization", "").partition(" ")
        given = secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key")
        key = None if given is None else settings.key_of(given)
        if key is None:
            told = {"www-authenticate": "Bearer"}
            raise ApiError(401, "the API key is missing or unknown", code="invalid_api_key", headers=told)
        return key.name

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The body of a request, which must be JSON."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content type must be application/json", code="unsupported_type")
        limits = self.state.settings.limits
        most = int(limits.body_mb * MEGABYTE)
        return await read_body(headers, receive, most=most, seconds=limits.body_s)

    def _for_clients(self, work: Work, method: str = "POST") -> Answer:
        """A route that wants a key, counts as under way, and ends when its client leaves."""

        async def answer(headers: Headers, receive: Receive, sender: Sender) -> None:
            async with self._slot():
                name = current().key = self._key(headers)
                raw = await self._body(headers, receive) if method == "POST" else b""
                await while_connected(receive, work(headers, raw, name, sender))

        return answer

    async def _gateway(
        self, translate: Translate, headers: Headers, raw: bytes, name: str | None, sender: Sender
    ) -> None:
        body = json_object(raw)
        if body is None:
            raise bad_request("the body must be a JSON object")
        asking = Asking(state=self.state, key=name, questions=self._questions)
        await sender.json(200, await translate(body, asking))

    async def _chat(self, headers: Headers, raw: bytes, name: str | None, sender: Sender) -> None:
        settings = self.state.settings
        request = read_request(raw, choices=settings.limits.choices)
        current().model = self.state.upstream.names.known(request.model)
        case = Case(
            query=request.query,
            structured=request.structured,
            threshold=settings.policy.threshold_of(request.model, name),
        )
        decimals = settings.score_decimals if headers.get(DETAILS) == "1" else None
        if not request.stream:
            await self._whole(request.body, headers, case, sender, decimals)
        elif settings.policy.streaming == "off":
            current().outcome = UNGUARDED
            await unguarded(self.state, request.body, headers, sender)
        else:
            await guarded_stream(self.state, request, headers, case, sender, decimals)

    async def _whole(
        self, body: bytes, headers: Headers, case: Case, sender: Sender, decimals: int | None
    ) -> None:
        state, settings = self.state, self.state.settings
        started = time.perf_counter()
        async with state.upstream.ask("POST", "/chat/completions", headers, body) as response:
            raw = await state.upstream.whole(response)
        state.took("upstream", time.perf_counter() - started)
        completion = state.upstream.completion(raw)
        try:
            choices = read_choices(completion, settings.limits.choices)
        except Unreadable as error:
            raise state.upstream.fault("malformed", f"the upstream's answer has {error}") from None
        judged = await state.judged(judge(completion, choices, case, state.guard, settings.policy))
        content = judged.content
        if decimals is not None:
            content = {**content, "mllm_protector": judged.details(decimals)}
        sent = raw if judged.shadow and decimals is None else json.dumps(content).encode()
        failed = any(each.outcome is Outcome.GUARD_ERROR for each in judged.verdicts)
        state.released(len(sent), unscanned=judged.shadow and failed)
        await sender.whole(200, sent, {**passed_back(response.headers), OUTCOME: judged.header})

    async def _models(self, headers: Headers, _raw: bytes, _name: str | None, sender: Sender) -> None:
        async with self.state.upstream.ask("GET", "/models", headers) as response:
            body = await self.state.upstream.whole(response)
        self.state.upstream.names.learn(body)
        await sender.whole(200, body, passed_back(response.headers))

    async def _health(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        await sender.json(200, {"status": "ok"})

    async def _ready(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        state = {"guard": self.state.guard.ready, "upstream": await self.state.upstream.reachable({})}
        await sender.json(200 if all(state.values()) else 503, state)

    async def _page(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        body, given = page()
        await sender.whole(200, body, given, kind="text/html; charset=utf-8")

    async def _state(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        try:
            self._key(headers)
            trusted = True
        except ApiError:
            trusted = False
        await sender.json(200, await self.state.overview(trusted), {"cache-control": "no-store"})

    async def _metrics(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        guard = self.state.guard
        self.state.metrics.guard_ready.set(guard.ready)
        body = self.state.metrics.exposition()
        if guard.ready:
            body += str(guard.state.get("metrics", "")).encode()
        await sender.whole(200, body, {}, kind=counting.CONTENT_TYPE)
