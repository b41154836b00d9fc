"""A route as an ASGI application."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from mllm_protector.serving.api_errors import ApiError, ClientGone
from mllm_protector.serving.exchange import REQUEST_ID, Exchange, begin
from mllm_protector.serving.logs import place
from mllm_protector.serving.sending import Sender
from mllm_protector.serving.state import State
from mllm_protector.serving.tracing import Tracing

log = logging.getLogger(__name__)

Answer = Callable[[Headers, Receive, Sender], Awaitable[None]]

QUIET = ("/", "/state", "/health", "/ready", "/metrics")
"""Routes that machines ask all the time: they have no line in the log, and no span."""


class Endpoint:
    """One route as an ASGI application: every error becomes an answer, and every answer a line in the log."""

    def __init__(self, state: State, served: str, route: str, answer: Answer | None, method: str) -> None:
        """``served`` names the routes that are there; ``route`` is the name in logs and metrics."""
        self.state = state
        self.served = served
        self.route = route
        self.answer = answer
        self.method = method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        exchange = begin(headers.get(REQUEST_ID))
        sender = Sender(send, {REQUEST_ID: exchange.id})
        state, quiet = self.state, self.route in QUIET
        with (Tracing() if quiet else state.tracing).request(f"{self.method} {self.route}", headers) as span:
            await self._reply(scope, receive, sender, exchange)
            span |= {
                "http.route": self.route,
                "http.response.status_code": sender.status,
                "mllm_protector.outcome": exchange.outcome,
                "mllm_protector.request_id": exchange.id,
            }
        seconds = time.perf_counter() - started
        state.metrics.requests.labels(self.route, str(sender.status or "gone")).inc()
        if self.route.startswith("/v1/chat/"):
            state.took("all", seconds)
        if not quiet:
            facts = {"route": self.route, "status": sender.status, "seconds": round(seconds, 6)}
            facts |= {"outcome": exchange.outcome, "model": exchange.model, "error": exchange.error}
            told = {name: value for name, value in facts.items() if value is not None}
            log.info("a request was answered" if sender.status else "a client left", extra={"fields": told})

    async def _reply(self, scope: Scope, receive: Receive, sender: Sender, exchange: Exchange) -> None:
        """Answer, whatever happens, unless the client has left."""
        try:
            try:
                await self._answer(scope, receive, sender)
            except ApiError as error:
                exchange.error = error.code
                await sender.error(error)
            except (ClientGone, asyncio.CancelledError, OSError):
                raise
            except Exception as error:
                exchange.error = "internal_error"
                log.error("a request failed (%s at %s)", type(error).__name__, place(error))
                await sender.error(ApiError(500, "the guard's server failed", code="internal_error"))
        except (ClientGone, OSError):
            self.state.metrics.clients_gone.inc()

    async def _answer(self, scope: Scope, receive: Receive, sender: Sender) -> None:
        allowed = {self.method, "HEAD"} if self.method == "GET" else {self.method}
        if self.answer is None or scope["method"] not in allowed:
            status = 404 if self.answer is None else 405
            name = f"{scope['method']} {scope['path'][:200]}"
            message = f"{name} is not served, because it is not guarded. Served are: {self.served}"
            headers = {"allow": self.method} if self.answer else {}
            raise ApiError(status, message, code="route_not_guarded", headers=headers)
        await self.answer(Headers(scope=scope), receive, sender)
