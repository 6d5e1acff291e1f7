"""The server's one face over two transports, asked by a plain gRPC client and by broken ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.mesh.channels import MAX_MESSAGE_BYTES
from services.mesh.serve import Server
from tests.contract import probe as probes
from tests.contract.probe import CRASH, ECHO, FAIL, MAKE, NAME, PAUSE, TELL, WAIT, Probe, serving

LONG_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Call = grpc.aio.UnaryUnaryCall[bytes, bytes]


class Client:
    """A plain grpc.aio client."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self.channel, self.address = channel, address

    def call(
        self, method: str, request: bytes = b"", timeout_s: float | None = LONG_S, **metadata: str | bytes
    ) -> Call:
        sent = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        return self.channel.unary_unary(method)(request, timeout=timeout_s, metadata=sent)

    async def error(self, method: str, request: bytes = b"", timeout_s: float = LONG_S) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request, timeout_s)
        return raised.value


@contextlib.asynccontextmanager
async def client_of(address: str) -> AsyncIterator[Client]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Client(channel, address)


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tcp", "unix"])
async def served(transport: str, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Client, Probe]]:
    listen = "127.0.0.1:0" if request.param == "tcp" else f"unix:{folder / 'probe'}"
    async with serving(transport, listen) as (address, probe), client_of(address) as client:
        yield client, probe


async def test_health_follows_the_life_of_the_server(transport: str, folder: Path) -> None:
    listen = f"unix:{folder / 'probe'}"
    server = Server(listen, [probes.offer(Probe())], transport)
    await server.start()
    async with client_of(listen) as client:
        health = health_pb2_grpc.HealthStub(client.channel)

        async def check(name: str) -> int:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=LONG_S)
            return int(answer.status)

        assert [await check(name) for name in ("", NAME)] == [NOT_SERVING] * 2
        await server.ready()
        assert [await check(name) for name in ("", NAME)] == [SERVING] * 2
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check("no.such.Service")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        stopping = asyncio.create_task(server.stop(lame_duck_s=0.5, grace_s=1.0))
        await asyncio.sleep(0)
        assert [await check(name) for name in ("", NAME)] == [NOT_SERVING] * 2
        assert await client.call(ECHO, b"still") == b"still"  # a lame duck answers who has not looked away yet
        await stopping


async def test_health_can_be_watched(served: tuple[Client, Probe]) -> None:
    client, _ = served
    watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
    assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_reflection_lists_what_is_served(served: tuple[Client, Probe]) -> None:
    client, _ = served
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    info = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=LONG_S)
    answer = await info.read()
    info.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names


async def test_channelz_answers(served: tuple[Client, Probe]) -> None:
    client, _ = served
    stub = channelz_pb2_grpc.ChannelzStub(client.channel)
    answer = await stub.GetServers(channelz_pb2.GetServersRequest(), timeout=LONG_S)
    assert answer.server


@pytest.mark.parametrize(
    ("kind", "code", "message", "trailers"),
    [
        (
            "refused",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "voll, für jetzt: 100 %",
            {"x-shed-reason": "queue_full", "grpc-retry-pushback-ms": "250"},
        ),
        ("late", grpc.StatusCode.DEADLINE_EXCEEDED, "it could not have held", {"x-shed-reason": "deadline"}),
        ("unknown", grpc.StatusCode.NOT_FOUND, "no model 'x'", {}),
        ("down", grpc.StatusCode.UNAVAILABLE, "the store is away", {"x-shed-reason": "features_unavailable"}),
    ],
)
async def test_an_error_ends_as_its_status_with_trailers(
    served: tuple[Client, Probe],
    transport: str,
    kind: str,
    code: grpc.StatusCode,
    message: str,
    trailers: dict[str, str],
) -> None:
    client, _ = served
    error = await client.error(FAIL, kind.encode())
    assert (error.code(), error.details()) == (code, message)
    if transport == "native":  # it refuses to send this one
        trailers = {key: value for key, value in trailers.items() if key != "grpc-retry-pushback-ms"}
    assert {key: value for key, value in error.trailing_metadata()} == trailers  # noqa: C416 - dict() takes it for a mapping


async def test_bad_input_names_every_field(served: tuple[Client, Probe]) -> None:
    client, _ = served
    error = await client.error(FAIL, b"bad")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = error.trailing_metadata()["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    violations = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(violations)
    assert [(violation.field, violation.description) for violation in violations.field_violations] == [
        ("model", "must be set"),
        ("inputs.x", "must be a number, got 'a'"),
    ]


async def test_bytes_that_are_no_message_are_the_callers_fault(served: tuple[Client, Probe]) -> None:
    client, _ = served
    error = await client.error("/grpc.health.v1.Health/Check", b"\x0a\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc.health.v1.HealthCheckRequest" in (error.details() or "")


async def test_a_handler_sees_who_calls_and_how_long_they_wait(served: tuple[Client, Probe]) -> None:
    client, _ = served
    traceparent = f"00-{'a' * 32}-{'b' * 16}-00"
    told = json.loads(await client.call(TELL, timeout_s=9.0, x_priority="critical", traceparent=traceparent))
    assert 0 < told.pop("remaining_s") < 9.5
    assert told == {"priority": "critical", "tenant": "public", "cohort": "", "traceparent": traceparent}


async def test_no_deadline_is_seen_as_none(served: tuple[Client, Probe]) -> None:
    client, _ = served
    assert json.loads(await client.call(TELL, timeout_s=None))["remaining_s"] == float("inf")


async def test_unknown_priorities_and_text_that_is_not_ascii_do_no_harm(served: tuple[Client, Probe]) -> None:
    client, _ = served
    told = json.loads(await client.call(TELL, x_priority="me-first", x_blob_bin=b"\x00\xff"))
    assert told["priority"] == "background"


async def test_a_cancelled_call_is_cancelled_in_its_handler(served: tuple[Client, Probe]) -> None:
    client, probe = served
    call = client.call(WAIT)
    await asyncio.wait_for(probe.started.wait(), LONG_S)
    call.cancel()
    await asyncio.wait_for(probe.cancelled.wait(), LONG_S)


async def test_a_deadline_cancels_the_handler(served: tuple[Client, Probe]) -> None:
    client, probe = served
    error = await client.error(WAIT, timeout_s=0.1)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(probe.cancelled.wait(), LONG_S)


async def test_a_client_that_vanishes_cancels_its_calls(served: tuple[Client, Probe]) -> None:
    client, probe = served
    async with client_of(client.address) as other:
        call = other.call(WAIT)
        await asyncio.wait_for(probe.started.wait(), LONG_S)
    await asyncio.wait_for(probe.cancelled.wait(), LONG_S)
    assert call.done()


async def test_too_large_a_message_is_refused_both_ways(served: tuple[Client, Probe]) -> None:
    client, _ = served
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(client.address, options=options) as channel:
        asked = await Client(channel, client.address).error(ECHO, b"x" * (MAX_MESSAGE_BYTES + 1))
    answered = await client.error(MAKE, b"%d" % (MAX_MESSAGE_BYTES + 1))
    assert asked.code() is answered.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await client.call(ECHO, b"next") == b"next"


@pytest.mark.parametrize("size", [20_000, 60_000])
async def test_over_long_metadata_fails_its_own_call_only(
    served: tuple[Client, Probe], transport: str, size: int
) -> None:
    client, _ = served
    pause = client.call(PAUSE, b"0.2")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.call(TELL, x_cohort="c" * size)
    # native says so as HTTP status 431, for which gRPC has no code
    refused = {"grpcio": grpc.StatusCode.RESOURCE_EXHAUSTED, "native": grpc.StatusCode.UNKNOWN}
    assert raised.value.code() is refused[transport]
    assert await pause == b"0.2"


async def test_metadata_without_measure_may_cost_its_connection_but_not_the_server(
    served: tuple[Client, Probe],
) -> None:
    client, _ = served
    with pytest.raises(grpc.aio.AioRpcError):
        await client.call(TELL, x_cohort="c" * 300_000)
    async with client_of(client.address) as other:
        assert await other.call(ECHO, b"next") == b"next"


async def test_a_handler_that_crashes_fails_only_its_own_call(served: tuple[Client, Probe]) -> None:
    client, _ = served
    pause = client.call(PAUSE, b"0.1")
    assert (await client.error(CRASH)).code() is grpc.StatusCode.UNKNOWN
    assert await pause == b"0.1"


async def test_an_unknown_method_is_unimplemented(served: tuple[Client, Probe]) -> None:
    client, _ = served
    for method in (f"/{NAME}/Nope", "/no.such.Service/Nope"):
        assert (await client.error(method)).code() is grpc.StatusCode.UNIMPLEMENTED


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 1000,
        bytes(range(256)) * 40,
        PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"x" * 5000,  # a frame of 16 MiB
        PREFACE + SETTINGS + b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff",  # headers that are not HPACK
        PREFACE + SETTINGS + b"\x00\x00\x05\x00\x01\x00\x00\x00\x07hello",  # data on a stream that is not open
        PREFACE + SETTINGS + b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",  # a window opened by nothing
        PREFACE + SETTINGS + b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x83",  # headers without end
        PREFACE + b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff",  # a window of 4 GiB
    ],
)
async def test_malformed_frames_harm_nobody_else(served: tuple[Client, Probe], sent: bytes) -> None:
    client, _ = served
    pause = client.call(PAUSE, b"0.1")
    address = client.address
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(sent)
    with contextlib.suppress(ConnectionError, TimeoutError):
        await writer.drain()
        await asyncio.wait_for(reader.read(1000), 0.1)
    writer.close()
    assert await pause == b"0.1"
    assert await client.call(ECHO, b"next") == b"next"


async def test_two_servers_cannot_share_a_port(transport: str) -> None:
    async with serving(transport, "127.0.0.1:0") as (address, _):
        second = Server(address, [probes.offer(Probe())], transport)
        with pytest.raises(RuntimeError, match="Failed to bind"):
            await second.start()


@contextlib.asynccontextmanager
async def program(transport: str, listen: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The probe as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.probe", transport, listen), cwd=Path(__file__).parents[2]
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def connected(client: Client) -> None:
    """Returns when the server answers."""
    assert await client.channel.unary_unary(ECHO)(b"", timeout=LONG_S, wait_for_ready=True) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_told_to_stop_answers_what_is_in_flight_and_exits_0(
    transport: str, folder: Path, number: signal.Signals
) -> None:
    listen = f"unix:{folder / 'probe'}"
    async with program(transport, listen) as process, client_of(listen) as client:
        await connected(client)
        pause = client.call(PAUSE, b"1.0")
        await client.call(ECHO)  # so the call before it has arrived
        process.send_signal(number)
        assert await pause == b"1.0"
        assert await asyncio.wait_for(process.wait(), LONG_S) == 0


async def test_a_call_that_outlasts_the_grace_is_ended(transport: str, folder: Path) -> None:
    listen = f"unix:{folder / 'probe'}"
    probe = Probe()
    server = Server(listen, [probes.offer(probe)], transport)
    await server.start()
    async with client_of(listen) as client:
        wait = asyncio.create_task(client.error(WAIT))
        await asyncio.wait_for(probe.started.wait(), LONG_S)
        await server.stop(lame_duck_s=0.0, grace_s=0.1)
        await asyncio.wait_for(probe.cancelled.wait(), LONG_S)
        assert (await wait).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_socket_left_by_a_killed_process_does_not_block_its_successor(transport: str, folder: Path) -> None:
    listen = f"unix:{folder / 'probe'}"
    async with program(transport, listen) as process, client_of(listen) as client:
        await connected(client)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        with socket.socket(socket.AF_UNIX) as dead, pytest.raises(OSError, match=r"refused|No such file"):
            dead.connect(listen.removeprefix("unix:"))
    async with serving(transport, listen) as (address, _), client_of(address) as client:
        assert await client.call(ECHO, b"successor") == b"successor"
