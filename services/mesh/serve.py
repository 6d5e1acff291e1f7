"""A server, from start to drained, with one face over two transports.

"grpcio" is grpc.aio. "native" is pygrpc-native: HTTP/2 outside the GIL, calls reach Python in batches; it takes the
same servicers. Where its wheel is absent the server says so and runs on grpcio.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import grpc
from google.protobuf.message import DecodeError
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.mesh import attributes
from services.mesh.channels import MAX_MESSAGE_BYTES
from services.mesh.context import caller_of
from services.mesh.errors import ending_of
from services.mesh.settings import ServiceSettings
from services.mesh.telemetry import NO_TRACING, Tracing
from services.resilience.call import Call
from services.resilience.errors import BadInput, CallError, Violation

log = logging.getLogger(__name__)

Req = TypeVar("Req")
Res = TypeVar("Res")
Trailers = tuple[tuple[str, str | bytes], ...]
Method = Callable[[Any, Call[Req]], Awaitable[Res]]
Served = Callable[[Any, Req, Any], Awaitable[Res]]

_FLUSH_S = 0.1  # an answer reaches its socket in well under a millisecond, on a machine that is not busy
# grpc.aio answers CANCELLED past its pending calls; our own queues refuse earlier and say why
_PENDING_CALLS = 20_000
_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on one port is a mistake, and must fail as one
)
_GRPCIO_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.server.max_pending_requests", _PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING_CALLS),
)


@overload
def unary(method: str) -> Callable[[Method[Req, Res]], Served[Req, Res]]: ...
@overload
def unary(method: str, trailers: Callable[[Res], Trailers]) -> Callable[[Method[Req, Res]], Served[Req, Res]]: ...
def unary(
    method: str, trailers: Callable[[Res], Trailers] | None = None
) -> Callable[[Method[Req, Res]], Served[Req, Res]]:
    """Makes a servicer's method of one that takes a Call and raises our errors.

    method: "package.Service/Method", as spans name it.
    trailers: metadata that follows an answer.
    The servicer may have an attribute `tracing`; sampled calls then become server spans.
    """

    def wrap(handle: Method[Req, Res]) -> Served[Req, Res]:
        @functools.wraps(handle)
        async def serve_one(self: Any, request: Req, context: Any) -> Res:
            caller = caller_of(context)
            tracing: Tracing = getattr(self, "tracing", NO_TRACING)
            with tracing.server(method, caller.traceparent) as span:
                if span.recording:
                    span.set(attributes.RPC_SYSTEM, "grpc")
                    span.set(attributes.RPC_METHOD, method)
                    span.set(attributes.SPAN_PRIORITY, caller.priority.label)
                    span.set(attributes.SPAN_TENANT, caller.tenant)
                    caller = caller.with_traceparent(span.traceparent)
                try:
                    answer = await handle(self, Call(request, caller))
                except CallError as error:
                    ending = ending_of(error)
                    span.set(attributes.RPC_STATUS, ending.code.name)
                    span.set(attributes.REASON, ending.reason.label)
                    span.fail(ending.message)
                    failed = ending
                else:
                    span.set(attributes.RPC_STATUS, "OK")
                    if trailers is not None and (following := trailers(answer)):
                        context.set_trailing_metadata(following)
                    return answer
            await context.abort(failed.code, failed.message, _sendable(context, failed.trailers))
            raise AssertionError("abort returned")

        return serve_one

    return wrap


def _sendable(context: Any, trailers: Trailers) -> Trailers:
    """Less what pygrpc-native 0.5 refuses to send: it takes push-back for reserved, and the call would never end."""
    if type(context).__module__.startswith("pygrpc_native"):
        return tuple(pair for pair in trailers if pair[0] != attributes.PUSHBACK_MS)
    return trailers


@dataclass(frozen=True, slots=True)
class Offer:
    """A servicer, and how generated code adds it to a server.

    name: its full name, "tenfold.router.v1.RouterService".
    """

    name: str
    servicer: Any
    add: Callable[[Any, Any], None]


class Server:
    """One listening server with health, reflection and channelz.

    Health says NOT_SERVING until `ready` is called, and again from the start of `stop`.
    """

    def __init__(self, listen: str, offers: Iterable[Offer], transport: str = "grpcio") -> None:
        self.listen = listen
        self.transport = transport
        self._offers = list(offers)
        self._health = health.aio.HealthServicer()
        # reflection and channelz of the native transport run on grpcio behind it
        self._server = _new_server(transport)
        careful: Any = _Careful(self._server)
        for offer in self._offers:
            offer.add(offer.servicer, careful)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, careful)
        reflection.enable_server_reflection([*self.names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        channelz.add_channelz_servicer(self._server)
        if streams := _streams_of(self._server):
            self._server.add_generic_rpc_handlers((streams,))

    @property
    def names(self) -> list[str]:
        return [offer.name for offer in self._offers]

    async def start(self) -> int:
        """Listens; the port, or 0 for a Unix socket. Raises RuntimeError where the address is taken."""
        for name in ("", *self.names):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        port = int(self._server.add_insecure_port(self.listen))
        await self._server.start()
        return 0 if self.listen.startswith("unix:") else port

    async def ready(self, serving: bool = True) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", *self.names):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, *, lame_duck_s: float, grace_s: float) -> None:
        """Says NOT_SERVING, waits for balancers to look away, then lets calls in flight finish."""
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(lame_duck_s)
        await self._server.stop(await _flushed(self._server, grace_s))


def _new_server(transport: str) -> Any:
    threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grpc")  # channelz is not asynchronous
    if transport == "native":
        try:
            # `from pygrpc_native import aio` recurses for ever in 0.5.0
            import pygrpc_native.aio as native
        except ImportError:
            log.warning("pygrpc-native is not installed; serving with grpcio instead")
        else:
            return native.server(threads, options=list(_OPTIONS))
    return grpc.aio.server(threads, options=[*_OPTIONS, *_GRPCIO_OPTIONS])


class _Careful:
    """What servicers are added to in place of their server, so that a message which is none is the caller's fault.

    Both transports would call it theirs, INTERNAL or UNKNOWN, and log a traceback for it.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(tuple(_CarefulMethods(methods) for methods in handlers))

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        careful = {method: _careful(handler) for method, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, careful)


class _CarefulMethods(grpc.GenericRpcHandler):
    """The same methods, each made careful when it is first called."""

    def __init__(self, methods: grpc.GenericRpcHandler) -> None:
        self._methods = methods
        self._careful: dict[str, Any] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path = handler_call_details.method
        if path not in self._careful and (handler := self._methods.service(handler_call_details)) is not None:
            self._careful[path] = _careful(handler)
        return self._careful.get(path)


def _careful(handler: Any) -> Any:
    """The handler of a unary method, answering INVALID_ARGUMENT to what cannot be decoded."""
    decode, serve_one = handler.request_deserializer, handler.unary_unary
    if serve_one is None or decode is None:
        return handler

    def decode_or_tell(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError as error:
            return error

    @functools.wraps(serve_one)
    async def serve_decoded(request: Any, context: Any) -> Any:
        if isinstance(request, DecodeError):
            ending = ending_of(unreadable(request))
            await context.abort(ending.code, ending.message, ending.trailers)
        return await serve_one(request, context)

    return handler._replace(request_deserializer=decode_or_tell, unary_unary=serve_decoded)


def unreadable(error: DecodeError) -> BadInput:
    return BadInput(Violation("request", f"must be a serialized message of this method: {error}"))


class _Streams(grpc.GenericRpcHandler):
    """Methods with a stream of requests, by their full name."""

    def __init__(self, methods: dict[str, Any]) -> None:
        self._methods = methods

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(handler_call_details.method)


def _streams_of(server: Any) -> _Streams | None:
    """What pygrpc-native 0.5 would lose: it hands such methods to a grpcio server behind it, in a way that the grpcio
    we use ignores, reflection's among them. As a generic handler that server takes them.
    """
    registered: dict[str, Any] = getattr(server, "_registered", {})
    methods = {path: handler for path, handler in registered.items() if handler.request_streaming}
    return _Streams(methods) if methods else None


async def _flushed(server: Any, grace_s: float) -> float:
    """Seconds of grace that are left once what pygrpc-native 0.5 has in flight is answered and on its way.

    When it stops it drops the connections at once, and with them answers that a call has given but no socket taken.
    """
    calls: dict[int, Any] = getattr(server, "_calls", {})
    tasks = [call.task for call in calls.values() if call.task is not None]
    if not tasks:
        return grace_s
    started = time.monotonic()
    await asyncio.wait(tasks, timeout=grace_s)
    await asyncio.sleep(_FLUSH_S)
    return max(0.0, grace_s - (time.monotonic() - started))


async def stop_requested() -> None:
    """Returns at SIGTERM or SIGINT. A second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)


async def serve(settings: ServiceSettings, offers: Iterable[Offer], make_ready: Callable[[], Awaitable[None]]) -> None:
    """Listens, becomes ready, serves until told to stop, drains.

    make_ready: returns when the first request can be answered: models warmed, stores reached.
    """
    server = Server(settings.listen, offers, settings.transport)
    await server.start()
    log.info("listening", extra={"listen": settings.listen, "transport": settings.transport})
    stopping = asyncio.create_task(stop_requested())
    getting_ready = asyncio.ensure_future(make_ready())
    try:
        await asyncio.wait({stopping, getting_ready}, return_when=asyncio.FIRST_COMPLETED)
        if getting_ready.done():
            getting_ready.result()  # a service that cannot become ready must not pretend
            _settle_down()
            await server.ready()
            log.info("serving", extra={"services": server.names})
        await stopping
    finally:
        getting_ready.cancel()
        stopping.cancel()
        log.info("draining", extra={"grace_s": settings.grace_s})
        await server.stop(lame_duck_s=settings.lame_duck_s, grace_s=settings.grace_s)
        log.info("stopped")


def _settle_down() -> None:
    """Takes what has been imported and built out of the garbage collector's sight, and lets it look less often.

    What a request leaves behind is freed by reference counts; a collection in the middle of one walks through the whole
    process for nothing. Saves about a twentieth of the CPU of a busy service.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent dies, so that no stack leaves orphans; elsewhere does nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
