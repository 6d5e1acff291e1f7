"""Spans of sampled requests, sent by OTLP.

The gateway decides what is sampled; a service follows. An unsampled request costs one look at its traceparent.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Protocol

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from services.mesh import attributes
from services.mesh.context import is_sampled

_WELL_FORMED = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
EXPORT_EVERY_MS = 500  # a trace is readable within a second of its end


class Recorded(Protocol):
    """A piece of a request's story, as a context manager."""

    @property
    def traceparent(self) -> str:
        """What calls made within it carry."""
        ...

    @property
    def recording(self) -> bool: ...
    def set(self, name: str, value: str | int | float | bool) -> None: ...
    def fail(self, description: str) -> None: ...
    def __enter__(self) -> Recorded: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Unrecorded:
    """Stands in for a span of a request that is not sampled."""

    __slots__ = ("traceparent",)
    recording = False

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, name: str, value: str | int | float | bool) -> None:
        pass

    def fail(self, description: str) -> None:
        pass

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RecordedSpan:
    """A span of a sampled request."""

    __slots__ = ("_span",)
    recording = True

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        context = self._span.get_span_context()
        assert context is not None  # an SDK span always has one
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, name: str, value: str | int | float | bool) -> None:
        self._span.set_attribute(name, value)

    def fail(self, description: str) -> None:
        self._span.set_status(StatusCode.ERROR, description)

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(f"{type(error).__name__}: {error}")
        self._span.end()


class Tracing:
    """Makes spans under one service's name. `close` flushes what has not been sent."""

    def __init__(self, service: str, instance: str, exporter: SpanExporter | None) -> None:
        """exporter: None keeps no spans at all."""
        self._provider: TracerProvider | None = None
        self._tracer: trace.Tracer | None = None
        if exporter is not None:
            resource = Resource({"service.name": service, attributes.INSTANCE: instance})
            # the decision is the gateway's and arrives in traceparent; a sampler here would only repeat it
            self._provider = TracerProvider(resource=resource, span_limits=SpanLimits(max_attributes=32))
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=EXPORT_EVERY_MS)
            )
            self._tracer = self._provider.get_tracer("tenfold")

    @classmethod
    def to(cls, otlp: str, service: str, instance: str) -> Tracing:
        """Sends spans to an OTLP gRPC address ("host:port" or "unix:/path"); nowhere if it is empty."""
        exporter = OTLPSpanExporter(endpoint=otlp, insecure=True, timeout=2) if otlp else None
        return cls(service, instance, exporter)

    def server(self, name: str, traceparent: str) -> Recorded:
        return self._start(name, traceparent, SpanKind.SERVER)

    def client(self, name: str, traceparent: str) -> Recorded:
        return self._start(name, traceparent, SpanKind.CLIENT)

    def internal(self, name: str, traceparent: str) -> Recorded:
        return self._start(name, traceparent, SpanKind.INTERNAL)

    def _start(self, name: str, traceparent: str, kind: SpanKind) -> Recorded:
        if self._tracer is None or not is_sampled(traceparent) or not _WELL_FORMED.fullmatch(traceparent):
            return Unrecorded(traceparent)
        parent = trace.set_span_in_context(trace.NonRecordingSpan(_span_context(traceparent)))
        span = self._tracer.start_span(name, context=parent, kind=kind)
        return RecordedSpan(span) if isinstance(span, Span) else Unrecorded(traceparent)

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


NO_TRACING = Tracing("none", "none", None)


def _span_context(traceparent: str) -> trace.SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return trace.SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(int(flags, 16))
    )
