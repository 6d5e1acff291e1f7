from __future__ import annotations

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode

from services.mesh.telemetry import NO_TRACING, Tracing

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


class Kept(SpanExporter):
    """Keeps the spans it is given."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS


def test_a_sampled_request_is_recorded_below_its_parent() -> None:
    kept = Kept()
    tracing = Tracing("router", "router-0", kept)
    with tracing.server("p.S/M", SAMPLED) as outer:
        assert outer.recording
        outer.set("tenfold.tier", "full")
        with tracing.client("q.T/N", outer.traceparent) as inner:
            assert inner.traceparent.startswith(f"00-{TRACE_ID}-")
            assert inner.traceparent.endswith("-01")
            assert inner.traceparent not in (SAMPLED, outer.traceparent)
    tracing.close()
    client, server = kept.spans
    assert (server.name, server.kind, client.name, client.kind) == ("p.S/M", SpanKind.SERVER, "q.T/N", SpanKind.CLIENT)
    assert server.parent is not None
    assert client.parent is not None
    assert f"{server.parent.span_id:016x}" == PARENT_ID
    assert client.parent.span_id == server.context.span_id
    assert f"{client.context.trace_id:032x}" == TRACE_ID
    assert dict(server.attributes or {}) == {"tenfold.tier": "full"}
    assert server.resource.attributes["service.name"] == "router"
    assert server.resource.attributes["service.instance.id"] == "router-0"


def test_a_failure_is_marked_whether_told_or_raised() -> None:
    kept = Kept()
    tracing = Tracing("router", "router-0", kept)
    with tracing.internal("told", SAMPLED) as span:
        span.fail("no room")
    with pytest.raises(KeyError), tracing.internal("raised", SAMPLED):
        raise KeyError("x")
    tracing.close()
    assert [(span.status.status_code, span.status.description) for span in kept.spans] == [
        (StatusCode.ERROR, "no room"),
        (StatusCode.ERROR, "KeyError: 'x'"),
    ]


@pytest.mark.parametrize("traceparent", ["", UNSAMPLED, "garbage", SAMPLED.upper(), SAMPLED + "-extra", "z" * 54 + "1"])
def test_what_is_not_sampled_or_not_well_formed_is_passed_on_and_not_recorded(traceparent: str) -> None:
    kept = Kept()
    tracing = Tracing("router", "router-0", kept)
    with tracing.server("p.S/M", traceparent) as span:
        assert not span.recording
        assert span.traceparent == traceparent
        span.set("x", 1)
        span.fail("ignored")
    tracing.close()
    assert kept.spans == []


def test_without_a_collector_nothing_is_recorded() -> None:
    with NO_TRACING.server("p.S/M", SAMPLED) as span:
        assert not span.recording
    with Tracing.to("", "router", "router-0").server("p.S/M", SAMPLED) as span:
        assert span.traceparent == SAMPLED
