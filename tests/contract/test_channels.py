"""Both channels against both transports, directly and through a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.envoy import command
from services.mesh import h2frames as h2
from services.mesh.channels import KINDS, MAX_MESSAGE_BYTES, Channel, open_channel
from services.mesh.errors import CalleeError
from services.mesh.h2channel import FIRST_BACKOFF_S, LAST_BACKOFF_S, H2Channel, backoff_s
from services.resilience.errors import BadInput, Reason
from tests.contract.probe import CRASH, ECHO, FAIL, MAKE, PAUSE, TELL, WAIT, Probe, add_probe, serving

LONG_S = 20.0
ROUTES = [
    "grpcio over tcp",
    "grpcio over unix",
    "grpcio behind envoy",
    "native over tcp",
    "native over unix",
    "native behind envoy",
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tf"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def envoy_configuration(folder: Path) -> dict[str, Any]:
    """One listener that sends everything to one server, both on Unix sockets, and honours deadlines."""
    kind = "type.googleapis.com/envoy.extensions."
    route = {
        "cluster": "server",
        "timeout": "0s",
        "max_stream_duration": {"grpc_timeout_header_max": "0s"},
    }
    manager = {
        "@type": kind + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "egress",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": kind + "filters.http.router.v3.Router"}},
        ],
    }
    cluster = {
        "name": "server",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": kind + "upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(folder / "up")}}}}]}],
        },
    }
    listener = {
        "address": {"pipe": {"path": str(folder / "egress")}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@pytest.fixture(scope="module")
def envoy(folder: Path) -> Iterator[str]:
    """The address of a running Envoy in front of the socket `up` in the folder."""
    config = folder / "envoy.json"
    config.write_text(json.dumps(envoy_configuration(folder)))
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command(config), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LONG_S
        while not accepts(folder / "egress"):
            assert process.poll() is None, (folder / "envoy.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "Envoy did not come up"
            time.sleep(0.02)
        yield f"unix:{folder / 'egress'}"
    finally:
        process.terminate()
        process.wait(10)


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class Route:
    """A way to a server, which may be down. address: where a channel connects."""

    def __init__(self, transport: str, listen: str, address: str) -> None:
        self.transport, self._listen, self.address = transport, listen, address

    def up(self) -> AbstractAsyncContextManager[tuple[str, Probe]]:
        return serving(self.transport, self._listen)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, folder: Path) -> Route:
    transport, _, way = request.param.split()
    if way == "envoy":
        return Route(transport, f"unix:{folder / 'up'}", request.getfixturevalue("envoy"))
    if way == "unix":
        return Route(transport, f"unix:{folder / 'direct'}", f"unix:{folder / 'direct'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return Route(transport, address, address)


@pytest.fixture(params=KINDS)
async def channel(request: pytest.FixtureRequest, route: Route) -> AsyncIterator[Channel]:
    """Not connected yet."""
    async with opened(route.address, request.param) as channel:
        yield channel


@contextlib.asynccontextmanager
async def opened(address: str, kind: str) -> AsyncIterator[Channel]:
    channel = open_channel(address, kind)
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture
async def probe(route: Route) -> AsyncIterator[Probe]:
    async with route.up() as (_, probe):
        yield probe


async def error_of(channel: Channel, method: str, request: bytes = b"", timeout_s: float = LONG_S) -> CalleeError:
    with pytest.raises(CalleeError) as raised:
        await channel.unary(method, request, timeout_s=timeout_s)
    assert raised.value.callee == method
    return raised.value


@pytest.mark.parametrize("request_bytes", [b"", b"x", bytes(range(256)) * 3])
async def test_a_call_is_answered(probe: Probe, channel: Channel, request_bytes: bytes) -> None:
    assert await channel.unary(ECHO, request_bytes, timeout_s=LONG_S) == request_bytes


async def test_metadata_and_deadline_arrive(probe: Probe, channel: Channel) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    metadata = (
        ("x-priority", "critical"),
        ("x-tenant", "a tenant, with: punctuation ~"),
        ("x-cohort", "c" * 256),
        ("traceparent", traceparent),
    )
    for _ in range(2):
        told = json.loads(await channel.unary(TELL, b"", timeout_s=12.5, metadata=metadata))
        assert 0 < told.pop("remaining_s") < 13  # grpcio rounds a timeout up to three digits
        assert told["traceparent"].split("-")[1] == traceparent.split("-")[1]
        told["traceparent"] = traceparent
        assert told == {
            "priority": "critical",
            "tenant": "a tenant, with: punctuation ~",
            "cohort": "c" * 256,
            "traceparent": traceparent,
        }


async def test_many_calls_at_once_each_get_their_own_answer(probe: Probe, channel: Channel) -> None:
    requests = [b"%d" % number * (number % 50) for number in range(300)]
    answers = await asyncio.gather(*(channel.unary(ECHO, request, timeout_s=LONG_S) for request in requests))
    assert answers == requests


@pytest.mark.parametrize(
    ("kind", "code", "message", "reason"),
    [
        ("refused", grpc.StatusCode.RESOURCE_EXHAUSTED, "voll, für jetzt: 100 %", Reason.QUEUE_FULL),
        ("late", grpc.StatusCode.DEADLINE_EXCEEDED, "it could not have held", Reason.DEADLINE),
        (
            "bad",
            grpc.StatusCode.INVALID_ARGUMENT,
            "model: must be set; inputs.x: must be a number, got 'a'",
            Reason.DEPENDENCY_FAILED,
        ),
        ("unknown", grpc.StatusCode.NOT_FOUND, "no model 'x'", Reason.DEPENDENCY_FAILED),
        ("down", grpc.StatusCode.UNAVAILABLE, "the store is away", Reason.FEATURES_UNAVAILABLE),
    ],
)
async def test_an_error_arrives_with_code_message_and_reason(
    probe: Probe, channel: Channel, kind: str, code: grpc.StatusCode, message: str, reason: Reason
) -> None:
    error = await error_of(channel, FAIL, kind.encode())
    assert (error.code, error.message, error.reason) == (code, message, reason)


async def test_an_unknown_method_is_unimplemented(probe: Probe, channel: Channel) -> None:
    assert (await error_of(channel, "/tenfold.test.Probe/Nope")).code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_handler_that_crashes_fails_only_its_own_call(probe: Probe, channel: Channel) -> None:
    crashed, fine = await asyncio.gather(
        error_of(channel, CRASH), channel.unary(ECHO, b"fine", timeout_s=LONG_S), return_exceptions=True
    )
    assert isinstance(crashed, CalleeError)
    assert crashed.code is grpc.StatusCode.UNKNOWN
    assert fine == b"fine"


async def test_a_deadline_ends_the_call_on_both_sides(probe: Probe, channel: Channel) -> None:
    error = await error_of(channel, WAIT, timeout_s=0.2)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(probe.cancelled.wait(), LONG_S)
    assert await channel.unary(ECHO, b"next", timeout_s=LONG_S) == b"next"


async def test_a_cancelled_call_is_cancelled_at_the_callee_and_nowhere_else(probe: Probe, channel: Channel) -> None:
    other = asyncio.create_task(channel.unary(PAUSE, b"0.3", timeout_s=LONG_S))
    call = asyncio.create_task(channel.unary(WAIT, b"", timeout_s=LONG_S))
    await asyncio.wait_for(probe.started.wait(), LONG_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(probe.cancelled.wait(), LONG_S)
    assert await other == b"0.3"


async def test_large_messages_pass_in_both_directions(probe: Probe, channel: Channel) -> None:
    request = bytes(range(256)) * 2**14  # 4 MiB
    large, small, made = await asyncio.gather(
        channel.unary(ECHO, request, timeout_s=LONG_S),
        channel.unary(ECHO, b"small", timeout_s=LONG_S),
        channel.unary(MAKE, b"5000000", timeout_s=LONG_S),
    )
    assert large == request
    assert small == b"small"
    assert len(made) == 5_000_000


async def test_too_large_a_message_is_refused_and_the_channel_goes_on(probe: Probe, channel: Channel) -> None:
    asked = await error_of(channel, ECHO, b"x" * (MAX_MESSAGE_BYTES + 1))
    answered = await error_of(channel, MAKE, b"%d" % (MAX_MESSAGE_BYTES + 1))
    assert asked.code is answered.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await channel.unary(ECHO, b"next", timeout_s=LONG_S) == b"next"


@pytest.mark.parametrize("pair", [("x-tenant", "a\nb"), ("x-tenant", "käse"), ("Upper Case", "a")])
async def test_metadata_that_cannot_travel_is_refused_by_name(
    probe: Probe, channel: Channel, pair: tuple[str, str]
) -> None:
    with pytest.raises(BadInput, match=pair[0]):
        await channel.unary(ECHO, b"", timeout_s=LONG_S, metadata=(pair,))
    assert await channel.unary(ECHO, b"next", timeout_s=LONG_S) == b"next"


async def test_a_deadline_that_has_passed_is_not_sent(probe: Probe, channel: Channel) -> None:
    for timeout_s in (0.0, -1.0):
        assert (await error_of(channel, PAUSE, b"0", timeout_s)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert probe.most_running == 0


async def test_a_callee_that_is_down_is_unavailable_until_it_is_up(route: Route, channel: Channel) -> None:
    for _ in range(3):
        assert (await error_of(channel, ECHO)).code is grpc.StatusCode.UNAVAILABLE
    async with route.up():
        assert await eventually(channel, b"up") == b"up"


async def test_a_callee_that_comes_back_is_found_again(route: Route, channel: Channel) -> None:
    async with route.up() as (_, probe):
        in_flight = asyncio.create_task(error_of(channel, WAIT))
        await asyncio.wait_for(probe.started.wait(), LONG_S)
    assert (await in_flight).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    async with route.up():
        assert await eventually(channel, b"again") == b"again"


async def eventually(channel: Channel, request: bytes) -> bytes:
    """The first answer, asked for again and again: a channel or Envoy may still be waiting before it connects."""
    deadline = time.monotonic() + LONG_S
    while True:
        try:
            return await channel.unary(ECHO, request, timeout_s=LONG_S)
        except CalleeError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


async def test_after_closing_every_call_is_unavailable(probe: Probe, channel: Channel) -> None:
    in_flight = asyncio.create_task(error_of(channel, WAIT))
    await asyncio.wait_for(probe.started.wait(), LONG_S)
    await channel.close()
    assert (await in_flight).code is grpc.StatusCode.UNAVAILABLE
    assert (await error_of(channel, ECHO)).code is grpc.StatusCode.UNAVAILABLE


# --- of the channel in our own thread


@contextlib.asynccontextmanager
async def two_at_a_time(folder: Path, **options: int) -> AsyncIterator[tuple[str, Probe]]:
    """A server that takes two calls at once on a connection."""
    probe = Probe()
    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 2), *options.items()])
    add_probe(probe, server)
    server.add_insecure_port(f"unix:{folder / 'two'}")
    await server.start()
    yield f"unix:{folder / 'two'}", probe
    await server.stop(0.1)


async def test_calls_wait_for_room_and_survive_connections_that_are_taken_back(folder: Path) -> None:
    aging = {"grpc.max_connection_age_ms": 100, "grpc.max_connection_age_grace_ms": 2000}
    async with two_at_a_time(folder, **aging) as (address, _), opened(address, "h2") as channel:
        calls = [channel.unary(PAUSE, b"0.02", timeout_s=LONG_S) for _ in range(60)]
        assert await asyncio.gather(*calls) == [b"0.02"] * 60


async def test_no_more_calls_are_under_way_than_the_server_allows(folder: Path) -> None:
    async with two_at_a_time(folder) as (address, probe), opened(address, "h2") as channel:
        await asyncio.gather(*(channel.unary(PAUSE, b"0.01", timeout_s=LONG_S) for _ in range(20)))
        assert probe.most_running == 2


async def test_a_call_that_waits_for_room_gives_up_at_its_deadline(folder: Path) -> None:
    async with two_at_a_time(folder) as (address, probe), opened(address, "h2") as channel:
        holders = [asyncio.create_task(error_of(channel, WAIT, timeout_s=1.0)) for _ in range(2)]
        await asyncio.wait_for(probe.started.wait(), LONG_S)
        assert (await error_of(channel, PAUSE, b"0", timeout_s=0.1)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.gather(*holders)
        assert probe.most_running == 0


async def test_no_more_calls_wait_than_there_is_room_to_wait(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:  # accepts connections and never speaks
        deaf.bind(str(folder / "deaf"))
        deaf.listen()
        channel = H2Channel(f"unix:{folder / 'deaf'}", max_message_bytes=1000, max_waiting=3)
        waiting = [asyncio.create_task(error_of(channel, ECHO, timeout_s=0.3)) for _ in range(3)]
        await asyncio.sleep(0)
        error = await error_of(channel, ECHO)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
        assert [(await call).code for call in waiting] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 3
        after = asyncio.create_task(error_of(channel, ECHO, timeout_s=LONG_S))
        await asyncio.sleep(0)
        assert not after.done()  # those that gave up have left their places
        error = await after
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "no answer within 1 s" in error.message
        await channel.close()


async def test_cancelled_calls_leave_nothing_behind(folder: Path) -> None:
    async with serving("grpcio", f"unix:{folder / 'leak'}") as (address, _):
        channel = H2Channel(address, max_message_bytes=1000)
        for _ in range(5):
            calls = [asyncio.create_task(channel.unary(WAIT, b"", timeout_s=LONG_S)) for _ in range(50)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert await channel.unary(ECHO, b"next", timeout_s=LONG_S) == b"next"
        (connection,) = channel._connections
        assert len(connection) == 0
        assert not channel._waiting
        await channel.close()
        assert not channel._connections


@contextlib.asynccontextmanager
async def saying(first: bytes) -> AsyncIterator[str]:
    """The address of a server that says this to everyone, waits for a request and hangs up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await reader.readuntil(ECHO.encode())
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_server_that_speaks_something_else_is_unavailable() -> None:
    async with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address, opened(address, "h2") as channel:
        error = await error_of(channel, ECHO)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "broke the protocol" in error.message


async def test_a_server_that_goes_away_at_once_is_unavailable() -> None:
    goaway = h2.frame(h2.GOAWAY, 0, 0, bytes(8))
    async with saying(h2.settings({}) + goaway) as address, opened(address, "h2") as channel:
        error = await error_of(channel, ECHO)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "took the connection back at once" in error.message


async def test_after_a_connection_was_lost_the_next_one_is_made_a_moment_later() -> None:
    async with saying(h2.settings({})) as address:
        channel = H2Channel(address, max_message_bytes=1000)
        started = asyncio.get_running_loop().time()
        error = await error_of(channel, ECHO)
        assert "connection lost" in error.message
        assert channel._not_before >= started + FIRST_BACKOFF_S / 2
        await channel.close()


def test_the_wait_before_another_attempt_grows_to_its_limit() -> None:
    for failures in range(1, 100):
        longest = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1))
        assert longest / 2 <= backoff_s(failures) <= longest


def test_a_channel_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="must be h2 or grpcio, got 'quic'"):
        open_channel("127.0.0.1:1", "quic")
