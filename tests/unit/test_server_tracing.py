"""Spans: what they tell, what they cost when off, and that nobody waits for them."""

from __future__ import annotations

import logging
import sys
import threading
import time
import tracemalloc
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_kit import LAYOUT, ServerInside, prefix, soon

from kvferry.connector import __version__
from kvferry.connector.errors import ConfigError
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.tracing import OFF, OpenTelemetryTracer, open_tracer

LOGGER = logging.getLogger("kvferry.server")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def finished(exporter: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_what_came_of_it() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    before = time.time_ns()
    with tracer.request("load", tenant="research", model="66666666", keys=8) as span:
        assert exporter.get_finished_spans() == ()
        span.set(blocks=5)
        span.set(bytes=4096, blocks=6)
    tracer.close(soon())
    (told,) = finished(exporter)
    assert (told.name, told.kind, told.parent) == ("kvferry.load", SpanKind.SERVER, None)
    assert told.attributes == {
        "kvferry.tenant": "research",
        "kvferry.model": "66666666",
        "kvferry.keys": 8,
        "kvferry.blocks": 6,
        "kvferry.bytes": 4096,
    }
    assert told.start_time is not None
    assert told.end_time is not None
    assert before <= told.start_time <= told.end_time <= time.time_ns()
    assert told.status.status_code is StatusCode.UNSET


def test_a_request_that_fails_is_told_with_the_kind_of_failure_only() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    with pytest.raises(ConnectionResetError, match="secret"):
        with tracer.request("store", keys=2):
            raise ConnectionResetError("something secret")
    tracer.close(soon())
    (told,) = finished(exporter)
    assert told.status.status_code is StatusCode.ERROR
    assert told.attributes == {"kvferry.keys": 2, "error.type": "ConnectionResetError"}
    assert "secret" not in told.to_json()


def test_what_is_over_can_be_told_afterwards() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    tracer.record("lookup", 1_000_000, 3_500_000, {"keys": 3, "ready": 2})
    tracer.close(soon())
    (told,) = finished(exporter)
    assert (told.name, told.start_time, told.end_time) == ("kvferry.lookup", 1_000_000, 3_500_000)
    assert told.attributes == {"kvferry.keys": 3, "kvferry.ready": 2}


def test_the_service_is_kvferry_unless_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for variable, value in ((None, ""), ("OTEL_SERVICE_NAME", "cache-7")):
        if variable is not None:
            monkeypatch.setenv(variable, value)
        exporter = InMemorySpanExporter()
        tracer = OpenTelemetryTracer(exporter)
        tracer.record("lookup", 1, 2, {})
        tracer.close(soon())
        (told,) = finished(exporter)
        assert told.resource.attributes["service.version"] == __version__
        names.append(told.resource.attributes["service.name"])
    assert names == ["kvferry", "cache-7"]


def test_off_makes_nothing_and_keeps_nothing() -> None:
    assert open_tracer(ServerConfig(), LOGGER) is OFF
    assert not OFF.is_on
    with OFF.request("load", keys=1) as span, OFF.request("store") as other:
        span.set(blocks=1)
        assert span is other
    with pytest.raises(ValueError, match="goes through"), OFF.request("load"):
        raise ValueError("goes through")
    OFF.record("lookup", 1, 2, {})
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            with OFF.request("load", keys=1) as span:
                span.set(blocks=1)
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
    OFF.close(soon())


class _Stuck(SpanExporter):
    """Takes no span before it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.entered = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.released.wait(20.0)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.released.set()


def test_nobody_waits_for_a_collector_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    exporter = _Stuck()
    tracer = OpenTelemetryTracer(exporter)
    for _ in range(600):
        tracer.record("lookup", 1, 2, {})
    assert exporter.entered.wait(20.0)
    started = time.monotonic()
    for _ in range(5000):
        tracer.record("lookup", 1, 2, {})
    assert time.monotonic() - started < 10.0, "more than fit are dropped, and nobody waits"
    started = time.monotonic()
    tracer.close(started + 0.2)
    assert 0.1 < time.monotonic() - started < 5.0
    exporter.released.set()


def test_spans_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, str | None, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["x-key"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, name="collector")
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=abc")
        tracer = open_tracer(ServerConfig(tracing=True), LOGGER)
        assert tracer.is_on
        with tracer.request("store", tenant="research") as span:
            span.set(stored=3)
        tracer.close(soon())
        http.shutdown()
        thread.join(20.0)
    ((path, key, body),) = received
    assert (path, key) == ("/v1/traces", "abc")
    assert b"kvferry.store" in body
    assert b"research" in body


def told_by(exporter: InMemorySpanExporter, kind: str) -> list[dict[str, object]]:
    """The attributes of all spans of one kind, in order, without the prefix of their names."""
    return [
        {name.removeprefix("kvferry."): value for name, value in (span.attributes or {}).items()}
        for span in finished(exporter)
        if span.name == f"kvferry.{kind}"
    ]


def test_streaming_clients_are_traced() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    keys = prefix(8)
    with ServerInside(tracer=tracer) as inside:
        client = inside.client(inside.pool("research"))
        client.store(keys[:5])
        client.load(keys)
        client.contains(keys)
    tracer.close(soon())
    who = {"tenant": "research", "model": "66666666", "client": "stream-0"}
    five = 5 * LAYOUT.payload_bytes
    assert told_by(exporter, "store") == [{**who, "keys": 5, "blocks": 5, "bytes": five, "refused": 0}]
    assert told_by(exporter, "load") == [{**who, "keys": 8, "blocks": 5, "bytes": five}]
    assert told_by(exporter, "contains") == [who]


def test_engines_that_map_the_arena_are_traced() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    keys = prefix(4)
    with ServerInside(tracer=tracer) as inside:
        engine = inside.engine()
        engine.lookup(keys)
        engine.save(keys[:3])
        engine.lookup(keys)
        engine.read(keys)
    tracer.close(soon())
    who = {"tenant": "", "model": "66666666", "client": "engine-0"}
    assert told_by(exporter, "lookup") == [
        {**who, "keys": 4, "ready": 0, "reachable": 0, "missing": "never_stored"},
        {**who, "keys": 4, "ready": 3, "reachable": 3, "missing": "never_stored"},
    ]
    assert told_by(exporter, "reserve") == [{**who, "keys": 3, "blocks": 3}]
    assert told_by(exporter, "commit") == [{**who, "keys": 3}]
    assert told_by(exporter, "lease") == [{**who, "keys": 4, "blocks": 3}]
    assert told_by(exporter, "release") == [], "it is about no blocks"


def test_no_key_is_in_a_span() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    (key,) = prefix(1)
    with ServerInside(tracer=tracer) as inside:
        inside.engine().save([key])
        inside.client().load([key])
    tracer.close(soon())
    assert finished(exporter)
    assert not any(key[:4].hex() in span.to_json() for span in finished(exporter))


def test_opentelemetry_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert open_tracer(ServerConfig(), LOGGER) is OFF
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[otel\]'"):
        open_tracer(ServerConfig(tracing=True), LOGGER)
