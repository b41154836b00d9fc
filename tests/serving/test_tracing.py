"""Spans of requests, with the exporter that keeps them in memory."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from mllm_protector.serving import tracing
from mllm_protector.serving.proxy import Front
from mllm_protector.serving.tracing import Tracing
from tests.serving.fakes import HTTP, Said, Upstream, WordGuard, completion, message, serving, stream
from tests.serving.processes import until
from tests.serving.test_proxy import CANARY, QUESTION, saying, to

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Traced:
    """A front whose spans are kept."""

    def __init__(self, upstream: Upstream, url: str, exporter: InMemorySpanExporter) -> None:
        self.upstream = upstream
        self.url = url
        self.exporter = exporter

    def ask(self, stream: bool = False, **headers: str) -> None:
        HTTP.post(f"{self.url}/v1/chat/completions", json={**QUESTION, "stream": stream}, headers=headers)

    def spans(self, requests: int = 1) -> tuple[ReadableSpan, ...]:
        """Those of so many requests, once all have ended: a client is answered before that."""
        get = self.exporter.get_finished_spans
        until(lambda: sum(span.kind is SpanKind.SERVER for span in get()) >= requests)
        return get()


@contextmanager
def traced(said: Said) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Upstream(saying(said)) as upstream:
        front = Front(to(upstream.url), WordGuard(), tracing=Tracing(provider))
        with serving(front.app()) as url:
            yield Traced(upstream, url, exporter)


def test_a_request_is_a_span_with_upstream_and_guard_inside_and_no_text() -> None:
    with traced(completion(message(f"FORBIDDEN {CANARY}"))) as on:
        on.ask(traceparent=PARENT, tracestate="vendor=1", authorization=f"Bearer {CANARY}")
        HTTP.get(f"{on.url}/health")
        HTTP.get(f"{on.url}/state")
        spans = {span.name: span for span in on.spans()}
        assert spans.keys() == {"POST /v1/chat/completions", "upstream", "guard"}
        request = spans["POST /v1/chat/completions"]
        assert request.kind is SpanKind.SERVER
        assert f"{request.parent.span_id:x}" == "b7ad6b7169203331"
        assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
        for name in ("upstream", "guard"):
            assert spans[name].parent.span_id == request.context.span_id, name
        sent = on.upstream.asked[0].headers
        assert sent["traceparent"] == f"00-{TRACE}-{spans['upstream'].context.span_id:016x}-01"
        assert sent["tracestate"] == "vendor=1"
        assert request.attributes["mllm_protector.outcome"] == "rewritten"
        assert request.attributes["http.response.status_code"] == 200
        assert len(request.attributes["mllm_protector.request_id"]) == 32
        assert CANARY not in "".join(span.to_json() for span in spans.values())


def test_a_stream_has_the_same_spans_and_concurrent_requests_keep_apart() -> None:
    chunk = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"fine"},"finish_reason":"stop"}]}\n\n'
    with traced(stream(chunk, b"data: [DONE]\n\n")) as on:
        with ThreadPoolExecutor(8) as threads:
            [*threads.map(lambda each: each.ask(stream=True), 8 * [on])]
        spans = on.spans(requests=8)
        assert len(spans) == 24
        assert len({span.context.trace_id for span in spans}) == 8
        for trace in {span.context.trace_id for span in spans}:
            names = sorted(span.name for span in spans if span.context.trace_id == trace)
            assert names == ["POST /v1/chat/completions", "guard", "upstream"]


def test_a_failed_request_is_marked_but_its_words_are_not_recorded() -> None:
    with traced(Said([f"no JSON {CANARY}".encode()])) as on:
        on.ask()
        spans = {span.name: span for span in on.spans()}
        request = spans["POST /v1/chat/completions"]
        assert request.status.status_code is StatusCode.ERROR
        assert request.attributes["http.response.status_code"] == 502
        assert not [span.name for span in spans.values() if span.events]
        assert CANARY not in "".join(span.to_json() for span in spans.values())


def test_the_environment_turns_traces_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.configured()._tracer is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    on = tracing.configured()
    assert on._provider is not None
    assert on._provider.resource.attributes["service.name"] == "mllm-protector"
    on.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert tracing.configured()._tracer is None
    assert "mllm-protector[otel]" in caplog.text


def test_without_traces_those_of_the_client_go_on_to_the_upstream() -> None:
    with Upstream(saying(completion(message("fine")))) as upstream:
        front = Front(to(upstream.url), WordGuard(), tracing=Tracing())
        with serving(front.app()) as url:
            HTTP.post(f"{url}/v1/chat/completions", json=QUESTION, headers={"traceparent": PARENT})
        assert upstream.asked[0].headers["traceparent"] == PARENT
