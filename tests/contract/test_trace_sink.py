"""The OTLP sink over real gRPC, fed by the exporter that services use."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from loadtest.traces import tree
from loadtest.traces.sink import Keep, TraceSink, spans_of
from loadtest.traces.store import TraceStore
from services.mesh.serve import Server
from services.mesh.telemetry import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[TraceStore]:
    with TraceStore(folder / "traces.db", writable=True) as opened:
        yield opened


def export_request(count: int) -> trace_service_pb2.ExportTraceServiceRequest:
    request, began_ns = trace_service_pb2.ExportTraceServiceRequest(), time.time_ns()
    spans = request.resource_spans.add().scope_spans.add().spans
    for i in range(count):
        span = spans.add(trace_id=bytes.fromhex(TRACE), span_id=i.to_bytes(8, "big"), name=f"s{i}")
        span.start_time_unix_nano = began_ns + i
    return request


async def test_spans_of_a_service_s_tracing_become_one_tree(folder: Path, store: TraceStore) -> None:
    address = f"unix:{folder}/otlp.sock"
    sink = TraceSink(store)
    server = Server(address, [sink.offer()])
    await server.start()
    router, feature = Tracing.to(address, "router", "router-0"), Tracing.to(address, "feature", "feature-0")
    with router.server("p.Router/Predict", SAMPLED) as top, router.client("p.Feature/Get", top.traceparent) as call:
        with feature.server("p.Feature/Get", call.traceparent) as served:
            served.set("tenfold.feature.rows", 8)
        call.fail("it was slow")
    await asyncio.gather(asyncio.to_thread(router.close), asyncio.to_thread(feature.close))  # flush over the wire
    await server.stop(lame_duck_s=0, grace_s=1)
    await sink.close()

    (top_node,) = tree.build(store.trace(TRACE))
    assert (top_node.span.service, top_node.span.name) == ("router", "p.Router/Predict")
    (call_node,) = top_node.children
    assert (call_node.span.failed, call_node.span.message) == (True, "it was slow")
    (served_node,) = call_node.children
    assert (served_node.span.instance, served_node.span.attributes["tenfold.feature.rows"]) == ("feature-0", 8)


async def test_spans_beyond_the_inbox_are_dropped_counted_and_told(folder: Path, store: TraceStore) -> None:
    address = f"unix:{folder}/otlp.sock"
    sink = TraceSink(store, Keep(max_waiting=5))
    server = Server(address, [sink.offer()])
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = trace_service_pb2_grpc.TraceServiceStub(channel)
        answer = await stub.Export(export_request(8), timeout=5)
    await server.stop(lame_duck_s=0, grace_s=1)
    await sink.close()
    assert answer.partial_success.rejected_spans == 3
    assert "5 spans wait" in answer.partial_success.error_message
    assert (sink.received, sink.dropped, len(store)) == (8, 3, 5)


def test_the_process_turns_healthy_writes_what_it_got_and_stops_clean(folder: Path) -> None:
    address = f"unix:{folder}/otlp.sock"
    environ = {**os.environ, "TENFOLD_LISTEN": address, "TENFOLD_TRACES": str(folder / "t.db")}
    process = subprocess.Popen([sys.executable, "-m", "loadtest.traces"], env=environ, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            trace_service_pb2_grpc.TraceServiceStub(channel).Export(export_request(3), timeout=5)
        process.send_signal(signal.SIGTERM)  # before the next write is due: nothing may be lost
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    with TraceStore(folder / "t.db") as store:
        assert [span.name for span in store.trace(TRACE)] == ["s0", "s1", "s2"]


def test_a_bad_setting_is_one_clear_line_and_exit_status_2() -> None:
    environ = {"TENFOLD_LISTEN": "unix:/tmp/x", "TENFOLD_TRACES": "/tmp/x.db", "TENFOLD_TRACES_MAX_SPANS": "0"}
    done = subprocess.run([sys.executable, "-m", "loadtest.traces"], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "loadtest.traces: max_spans must be above 0, got 0\n"


async def test_a_span_from_an_impossible_time_does_not_take_its_neighbours_with_it(store: TraceStore) -> None:
    sink = TraceSink(store)
    request = export_request(2)
    request.resource_spans[0].scope_spans[0].spans[0].start_time_unix_nano = 2**64 - 1
    request.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano = 2**64 - 1
    await sink.Export(request, None)  # type: ignore[arg-type]  # it asks nothing of its context
    await sink.close()
    assert [span.name for span in store.trace(TRACE)] == ["s1", "s0"]
    assert (len(store.newest()), sink.dropped) == (1, 0)


async def test_what_an_older_run_left_too_long_ago_leaves_with_the_first_write(store: TraceStore) -> None:
    old = export_request(1)
    old.resource_spans[0].scope_spans[0].spans[0].start_time_unix_nano = 1
    store.add(spans_of(old.resource_spans))
    sink = TraceSink(store)
    await sink.Export(export_request(1), None)  # type: ignore[arg-type]
    await sink.close()
    assert [span.start_ns > 1 for span in store.trace(TRACE)] == [True]


def test_a_file_that_is_no_database_is_one_clear_line_and_exit_status_2(folder: Path) -> None:
    file = folder / "t.db"
    file.write_text("no database, but long enough to be looked at " * 100)
    environ = {**os.environ, "TENFOLD_LISTEN": f"unix:{folder}/otlp.sock", "TENFOLD_TRACES": str(file)}
    done = subprocess.run([sys.executable, "-m", "loadtest.traces"], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"loadtest.traces: {file}: file is not a database\n"
