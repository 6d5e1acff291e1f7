"""Takes spans by OTLP gRPC and keeps them in SQLite.

Nothing waits for the disk: spans go into a bounded inbox and are written together, at most every 200 ms. When the
inbox is full, what comes is dropped and counted, and the sender is told how much: a telemetry store must never push
back on the work it watches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from loadtest.traces.store import Attributes, Span, TraceStore
from services.mesh import attributes as names
from services.mesh.serve import Offer

log = logging.getLogger(__name__)

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
WRITE_EVERY_S = 0.2
PRUNE_EVERY_SPANS = 5_000
_LATEST_NS = 2**62 - 1  # a start and a duration together still fit SQLite's 64 bits with a sign


@dataclass(frozen=True, slots=True)
class Keep:
    """max_spans: in the file; the oldest leave first. max_age_s: of a span. max_waiting: in the inbox, unwritten."""

    max_spans: int = 200_000
    max_age_s: float = 86_400.0
    max_waiting: int = 20_000

    def __post_init__(self) -> None:
        for name in ("max_spans", "max_age_s", "max_waiting"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class TraceSink(trace_service_pb2_grpc.TraceServiceServicer):
    """The receiving end of OTLP. Belongs to one event loop; `close` writes what still waits."""

    def __init__(self, store: TraceStore, keep: Keep | None = None) -> None:
        self._store, self._keep = store, keep or Keep()
        self._inbox: list[Span] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="traces")  # SQLite blocks; the event loop must not
        self._writing: asyncio.Task[None] | None = None
        self._since_prune = PRUNE_EVERY_SPANS  # at once: the file may be an older run's
        self.received = 0
        self.dropped = 0

    def offer(self) -> Offer:
        return Offer(SERVICE, self, trace_service_pb2_grpc.add_TraceServiceServicer_to_server)

    async def Export(  # noqa: N802 - the contract's name
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.aio.ServicerContext[object, object],  # noqa: ARG002
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        spans = list(spans_of(request.resource_spans))
        room = self._keep.max_waiting - len(self._inbox)
        taken, lost = spans[:room], max(0, len(spans) - room)
        self.received += len(spans)
        self._inbox += taken
        if self._inbox and self._writing is None:
            self._writing = asyncio.create_task(self._write_later())
        answer = trace_service_pb2.ExportTraceServiceResponse()
        if lost:
            self.dropped += lost
            answer.partial_success.rejected_spans = lost
            answer.partial_success.error_message = f"{self._keep.max_waiting} spans wait to be written already"
        return answer

    async def close(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._write()
        self._writer.shutdown()

    async def _write_later(self) -> None:
        """Writes until nothing waits, so that an idle sink has no timer running."""
        try:
            while self._inbox:
                await asyncio.sleep(WRITE_EVERY_S)
                await self._write()
        finally:
            self._writing = None

    async def _write(self) -> None:
        batch, self._inbox = self._inbox, []
        if not batch:
            return
        writing = asyncio.get_running_loop().run_in_executor(self._writer, self._write_now, batch)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # a batch on its way to the file is finished; there is no telling it back
            raise
        except Exception:
            self.dropped += len(batch)
            log.exception("spans lost", extra={"spans": len(batch), "dropped": self.dropped})

    def _write_now(self, batch: list[Span]) -> None:
        self._store.add(batch)
        self._since_prune += len(batch)
        if self._since_prune >= PRUNE_EVERY_SPANS:
            self._since_prune = 0
            oldest_ns = time.time_ns() - int(self._keep.max_age_s * 1e9)
            self._store.prune(keep_spans=self._keep.max_spans, older_than_ns=oldest_ns)


def spans_of(resource_spans: Iterable[trace_pb2.ResourceSpans]) -> Iterator[Span]:
    """What was sent, one by one, under today's attribute names."""
    for resource in resource_spans:
        about = _plain(resource.resource.attributes)
        service, instance = str(about.get("service.name", "unknown")), str(about.get(names.INSTANCE, ""))
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    trace=span.trace_id.hex(),
                    span=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    service=service,
                    instance=instance,
                    name=span.name,
                    start_ns=min(span.start_time_unix_nano, _LATEST_NS),
                    # a clock that was set back between start and end must not make time run backwards
                    duration_ns=min(max(0, span.end_time_unix_nano - span.start_time_unix_nano), _LATEST_NS),
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    message=span.status.message,
                    attributes=normalised(_plain(span.attributes)),
                )


_RENAMED = {
    "rpc.system": names.RPC_SYSTEM,
    "rpc.grpc.status_code": names.RPC_STATUS,
    "rpc.response.status_code": names.RPC_STATUS,
    "grpc.status_code": names.RPC_STATUS,
}
_STATUS_NAMES = {str(code.value[0]): code.name for code in grpc.StatusCode}


def normalised(attributes: Attributes) -> Attributes:
    """The same under today's names: RPC conventions were renamed, and gateways still send the old ones.

    rpc.service and rpc.method of old are one name, "package.Service/Method"; status codes are names, not numbers.
    """
    new = {_RENAMED.get(key, key): value for key, value in attributes.items()}
    if "rpc.service" in new:
        service = new.pop("rpc.service")
        method = str(new.get(names.RPC_METHOD, ""))
        if "/" not in method:
            new[names.RPC_METHOD] = f"{service}/{method}"
    if names.RPC_STATUS in new:
        status = str(new[names.RPC_STATUS])
        new[names.RPC_STATUS] = _STATUS_NAMES.get(status, status)
    return new


def _plain(attributes: Iterable[common_pb2.KeyValue]) -> Attributes:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: common_pb2.AnyValue) -> str | int | float | bool:
    kind = value.WhichOneof("value")
    if kind in ("string_value", "int_value", "double_value", "bool_value"):
        plain: str | int | float | bool = getattr(value, kind)
        return plain
    if kind == "array_value":
        return ", ".join(str(_value(item)) for item in value.array_value.values)
    return "" if kind is None else str(getattr(value, kind))
