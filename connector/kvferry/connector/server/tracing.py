"""Spans of what the server does, for OpenTelemetry; nothing at all unless ``server.tracing`` is set.

A span tells who asked (tenant, model), for what (kind, keys) and what came of it (blocks, bytes). No key, token or
text is in one. Spans are sent in the background by OpenTelemetry's own thread, in batches; when nobody takes them
they are dropped, and requests go on. Where to, and with which headers, say the usual ``OTEL_*`` variables.

Any thread may use a tracer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from kvferry.connector import __version__
from kvferry.connector.errors import ConfigError
from kvferry.connector.server.config import ServerConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["OFF", "OpenTelemetryTracer", "Span", "Tracer", "Value", "open_tracer"]

Value = str | int | float | bool
"""What an attribute can be."""
_PREFIX = "kvferry."
_HINT = "pip install 'kvferry[otel]'"


class Span(Protocol):
    """A request while it is served."""

    def set(self, **attributes: Value) -> None:
        """Add to what is told about it."""


class Tracer(Protocol):
    """Where spans go. ``is_on`` is for those who would have to compute attributes."""

    @property
    def is_on(self) -> bool:
        """Whether anybody hears of spans."""

    def request(self, kind: str, **attributes: Value) -> AbstractContextManager[Span]:
        """Trace what is done inside ``with``; an exception that leaves it marks the span as failed.

        Args:
            kind: Of request, as in the protocol: ``load``, ``store``, ``lookup``.
            attributes: What is known at the beginning.
        """

    def record(self, kind: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value]) -> None:
        """Add a span that is over.

        Args:
            kind: Of request.
            start_ns: Nanoseconds of ``time.time_ns``.
            end_ns: Likewise.
            attributes: What is told about it.
        """

    def close(self, deadline: float) -> None:
        """Send what is waiting, until ``deadline`` (``time.monotonic``) at most."""


class _NoSpan:
    """A span that nobody hears of; its own context manager, so that nothing is made for a request."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set(self, **attributes: Value) -> None:
        """Forget it."""


_NO_SPAN = _NoSpan()


class _Off:
    """The tracer when tracing is off."""

    is_on = False

    def request(self, kind: str, **attributes: Value) -> AbstractContextManager[Span]:
        """Trace nothing."""
        return _NO_SPAN

    def record(self, kind: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value]) -> None:
        """Forget it."""

    def close(self, deadline: float) -> None:
        """Nothing is waiting."""


OFF: Tracer = _Off()


class _OpenSpan:
    """Collects attributes until its request is over."""

    def __init__(self, attributes: dict[str, Value]) -> None:
        self.attributes = attributes

    def set(self, **attributes: Value) -> None:
        self.attributes.update(attributes)


class OpenTelemetryTracer:
    """Sends spans through OpenTelemetry's SDK.

    Args:
        exporter: Where they go.

    Raises:
        ConfigError: The SDK is not installed.
    """

    is_on = True

    def __init__(self, exporter: SpanExporter) -> None:
        try:
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
        except ImportError as error:
            raise ConfigError("server.tracing", "needs OpenTelemetry", _HINT) from error
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the environment names none
            resource = resource.merge(Resource({SERVICE_NAME: "kvferry"}))
        self._kind = SpanKind.SERVER
        self._failed = StatusCode.ERROR
        self._status = Status
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvferry.server", __version__)

    @contextlib.contextmanager
    def request(self, kind: str, **attributes: Value) -> Iterator[Span]:
        """Trace what is done inside ``with``."""
        span = _OpenSpan(attributes)
        start_ns = time.time_ns()
        try:
            yield span
        except BaseException as error:
            self._add(kind, start_ns, time.time_ns(), span.attributes, type(error).__name__)
            raise
        self._add(kind, start_ns, time.time_ns(), span.attributes, "")

    def record(self, kind: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value]) -> None:
        """Add a span that is over."""
        self._add(kind, start_ns, end_ns, attributes, "")

    def close(self, deadline: float) -> None:
        """Send what is waiting, on a thread of its own: the SDK keeps no deadline while it sends."""
        closing = threading.Thread(target=self._provider.shutdown, name="kvferry-tracing-close", daemon=True)
        closing.start()
        closing.join(max(0.0, deadline - time.monotonic()))

    def _add(
        self, kind: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value], failure: str
    ) -> None:
        span = self._tracer.start_span(
            _PREFIX + kind,
            kind=self._kind,
            start_time=start_ns,
            attributes={_PREFIX + name: value for name, value in attributes.items()},
        )
        if failure:
            span.set_attribute("error.type", failure)
            span.set_status(self._status(self._failed, failure))
        span.end(end_ns)


def open_tracer(config: ServerConfig, logger: logging.Logger) -> Tracer:
    """Return the tracer that the configuration asks for; ``OFF`` where it asks for none.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not config.tracing:
        return OFF
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError("server.tracing", "needs OpenTelemetry", _HINT) from error
    tracer = OpenTelemetryTracer(OTLPSpanExporter())
    logger.info("spans are sent to OTEL_EXPORTER_OTLP_ENDPOINT, or to port 4318 of this machine")
    return tracer
