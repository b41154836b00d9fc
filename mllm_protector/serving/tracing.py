"""Traces by OpenTelemetry: a span for each request, with one for the upstream and one for the guard inside.

They are on where the standard variable ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or that of traces alone) is set, and
the extra ``otel`` is installed. A span holds no text. The client's trace is continued, and goes on to the
upstream.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE = "mllm-protector"


class Tracing:
    """Spans of one front; without a provider nothing is done."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        """``provider`` gets the spans."""
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("mllm_protector")

    def request(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[dict[str, Any]]:
        """The span of a request.

        Args:
            name: method and route.
            headers: of the client; a trace in them is continued.

        Returns:
            What is put into it becomes the span's attributes.
        """
        return nullcontext({}) if self._tracer is None else self._request(name, headers)

    def part(self, name: str) -> AbstractContextManager[dict[str, str]]:
        """The span of a part of a request; gives the headers that continue the trace elsewhere."""
        return nullcontext({}) if self._tracer is None else self._part(name)

    def close(self) -> None:
        """Send the last spans."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextmanager
    def _request(self, name: str, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert self._tracer is not None  # noqa: S101 - asked before
        attributes: dict[str, Any] = {}
        with self._tracer.start_as_current_span(
            name,
            context=TraceContextTextMapPropagator().extract({**headers}),
            kind=SpanKind.SERVER,
            record_exception=False,  # its words may quote an answer
            set_status_on_exception=False,
        ) as span:
            try:
                yield attributes
            finally:
                span.set_attributes({key: value for key, value in attributes.items() if value is not None})
                if (attributes.get("http.response.status_code") or 0) >= 500:
                    span.set_status(StatusCode.ERROR)

    @contextmanager
    def _part(self, name: str) -> Iterator[dict[str, str]]:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert self._tracer is not None  # noqa: S101 - asked before
        span = self._tracer.start_span(name)  # never the current one: generators would carry it away
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))
        try:
            yield headers
        finally:
            span.end()


def configured() -> Tracing:
    """Tracing as the environment says."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces are sent (%s): pip install 'mllm-protector[otel]'", error)
        return Tracing()
    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
