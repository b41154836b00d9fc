"""The routes of a front: an OpenAI-compatible address whose answers are guarded.

Pure ASGI: each request watches its client, and work for a client that left is cancelled. Whatever is not
listed here is denied, because another route of the upstream would answer without the guard.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mllm_protector.errors import InputError
from mllm_protector.records import Outcome
from mllm_protector.serving import metrics as counting
from mllm_protector.serving.api_errors import ApiError, ClientGone
from mllm_protector.serving.chat import read_request
from mllm_protector.serving.choices import Unreadable, read_choices
from mllm_protector.serving.gateways.asking import Asking
from mllm_protector.serving.gateways.questions import Questions
from mllm_protector.serving.gateways.routes import GATEWAYS, Translate, read_object
from mllm_protector.serving.guarding import Guarding
from mllm_protector.serving.judging import Case, judge
from mllm_protector.serving.metrics import Metrics
from mllm_protector.serving.sending import OUTCOME, Sender, read_body, while_connected
from mllm_protector.serving.settings import MEGABYTE, FrontSettings
from mllm_protector.serving.state import State
from mllm_protector.serving.streaming import buffered, unguarded
from mllm_protector.serving.upstream import Upstream, passed_back

log = logging.getLogger(__name__)

DETAILS = "x-mllm-protector-details"
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
SERVED = f"POST {CHAT}, GET {MODELS}, GET /health, GET /ready, GET /metrics, POST {', POST '.join(GATEWAYS)}"

Answer = Callable[[Headers, Receive, Sender], Awaitable[None]]


class Front:
    """Answers clients.

    Attributes:
        state: its parts. Other settings in it hold from the next request on, but for the upstream's.
    """

    def __init__(self, settings: FrontSettings, guard: Guarding, metrics: Metrics | None = None) -> None:
        """Bind the parts; nothing is sent.

        Raises:
            InputError: a policy that is not there yet, or the upstream's key is missing.
        """
        if settings.policy.streaming == "window":
            raise InputError("policy.streaming=window: not available yet; choose buffer or off")
        metrics = metrics or Metrics()
        self.state = State(settings, guard, Upstream(settings, metrics), metrics)
        self._under_way = 0
        self._questions = Questions()

    def app(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await self.state.upstream.close()

        table: tuple[tuple[str, str, Answer], ...] = (
            (CHAT, "POST", self._chat),
            (MODELS, "GET", self._models),
            ("/health", "GET", self._health),
            ("/ready", "GET", self._ready),
            ("/metrics", "GET", self._metrics),
            *((path, "POST", self._gateway(translate)) for path, translate in GATEWAYS.items()),
        )
        routes = [Route(path, _Endpoint(self, path, answer, method)) for path, method, answer in table]
        app = Starlette(routes=routes, lifespan=lifespan)
        app.router.redirect_slashes = False
        app.router.default = _Endpoint(self, "other", None, "")
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

    def _gateway(self, translate: Translate) -> Answer:
        """What answers another gateway."""

        async def answer(headers: Headers, receive: Receive, sender: Sender) -> None:
            async with self._slot():
                name = self._key(headers)
                body = read_object(await self._body(headers, receive))
                asking = Asking(state=self.state, key=name, questions=self._questions)

                async def work() -> None:
                    await sender.json(200, await translate(body, asking))

                await while_connected(receive, work())

        return answer

    async def _chat(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        async with self._slot():
            settings = self.state.settings
            name = self._key(headers)
            raw = await self._body(headers, receive)
            request = read_request(raw, choices=settings.limits.choices)
            case = Case(
                query=request.query,
                structured=request.structured,
                threshold=settings.policy.threshold_of(request.model, name),
            )
            decimals = settings.score_decimals if headers.get(DETAILS) == "1" else None
            if not request.stream:
                work = self._whole(request.body, headers, case, sender, decimals)
            elif settings.policy.streaming == "off":
                work = unguarded(self.state, request.body, headers, sender)
            else:
                work = buffered(self.state, request.body, headers, case, sender, decimals)
            await while_connected(receive, work)

    async def _whole(
        self, body: bytes, headers: Headers, case: Case, sender: Sender, decimals: int | None
    ) -> None:
        state, settings = self.state, self.state.settings
        started = time.perf_counter()
        async with state.upstream.ask("POST", "/chat/completions", headers, body) as response:
            raw = await state.upstream.whole(response)
        state.metrics.seconds.labels("upstream").observe(time.perf_counter() - started)
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

    async def _models(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        async with self._slot():
            self._key(headers)
            await while_connected(receive, self._listed(headers, sender))

    async def _listed(self, headers: Headers, sender: Sender) -> None:
        async with self.state.upstream.ask("GET", "/models", headers) as response:
            body = await self.state.upstream.whole(response)
        await sender.whole(200, body, passed_back(response.headers))

    async def _health(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        await sender.json(200, {"status": "ok"})

    async def _ready(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        state = {"guard": self.state.guard.ready, "upstream": await self.state.upstream.reachable({})}
        await sender.json(200 if all(state.values()) else 503, state)

    async def _metrics(self, headers: Headers, receive: Receive, sender: Sender) -> None:
        self.state.metrics.guard_ready.set(self.state.guard.ready)
        body = self.state.metrics.exposition()
        await sender.whole(200, body, {}, kind=counting.CONTENT_TYPE)


class _Endpoint:
    """One route as an ASGI application: every error becomes an answer, and every answer a line in the log."""

    def __init__(self, front: Front, route: str, answer: Answer | None, method: str) -> None:
        self.front = front
        self.route = route
        self.answer = answer
        self.method = method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        sender, started = Sender(send), time.perf_counter()
        metrics = self.front.state.metrics
        try:
            try:
                await self._answer(scope, receive, sender)
            except ApiError as error:
                await sender.error(error)
            except (ClientGone, asyncio.CancelledError, OSError):
                raise
            except Exception as error:
                log.error("a request failed (%s at %s)", type(error).__name__, _place(error))
                await sender.error(ApiError(500, "the guard's server failed", code="internal_error"))
        except (ClientGone, OSError):
            metrics.clients_gone.inc()
        seconds = time.perf_counter() - started
        metrics.requests.labels(self.route, str(sender.status or "gone")).inc()
        if self.route == CHAT:
            metrics.seconds.labels("all").observe(seconds)
            log.info("%s", json.dumps({"route": self.route, "status": sender.status, "seconds": seconds}))

    async def _answer(self, scope: Scope, receive: Receive, sender: Sender) -> None:
        allowed = {self.method, "HEAD"} if self.method == "GET" else {self.method}
        if self.answer is None or scope["method"] not in allowed:
            status = 404 if self.answer is None else 405
            name = f"{scope['method']} {scope['path'][:200]}"
            message = f"{name} is not served, because it is not guarded. Served are: {SERVED}"
            headers = {"allow": self.method} if self.answer else {}
            raise ApiError(status, message, code="route_not_guarded", headers=headers)
        await self.answer(Headers(scope=scope), receive, sender)


def _place(error: BaseException) -> str:
    """Where an exception was raised; its own words may quote an answer."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
