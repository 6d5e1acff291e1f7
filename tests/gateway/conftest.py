"""A real Envoy before small real servicers, all on Unix sockets of one short folder."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from gateway import descriptors, envoy
from gateway.config import bootstrap
from gateway.topology import Topology
from services.mesh import meshfile
from services.mesh.serve import Offer, Server, unary
from services.resilience.errors import CallError
from tenfold.fallback.v1 import fallback_pb2, fallback_pb2_grpc
from tenfold.feature.v1 import feature_pb2, feature_pb2_grpc
from tenfold.inference.v2 import inference_pb2, inference_pb2_grpc
from tenfold.router.v1 import router_pb2, router_pb2_grpc

MESH = """
version = 1
name = "test"
[gateway]
trace_sample = 0.0
default_timeout_ms = 1500
[[priorities]]
name = "critical"
slo_p99_ms = 250
max_in_flight = 64
[[priorities]]
name = "standard"
slo_p99_ms = 500
max_in_flight = 64
[[priorities]]
name = "background"
slo_p99_ms = 2000
max_in_flight = 64
[[models]]
name = "m"
output = "y"
required_quality = { critical = 0, standard = 0, background = 0 }
[[models.tiers]]
name = "only"
model = "only"
quality = 1
usd_per_1000 = 1
expected_ms = 1
"""


@dataclass
class Behaviour:
    """What a replica does with a call, and what it saw of it."""

    name: str
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    code: grpc.StatusCode | None = None
    fail_next: int = -1  # how many calls end with `code`; -1 for all
    error: CallError | None = None  # raised as a service raises it
    seen: list[dict[str, Any]] = field(default_factory=list)
    remaining_s: list[float | None] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.hold.set()

    async def saw(self, count: int) -> None:
        """Returns when so many calls have arrived."""
        while len(self.seen) < count:
            self.arrived.clear()
            await self.arrived.wait()

    async def serve(self, context: Any) -> None:
        self.seen.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        self.arrived.set()
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.code is not None and self.fail_next != 0:
            self.fail_next -= 1
            await context.abort(self.code, f"{self.name} fails")


class Router(router_pb2_grpc.RouterServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def Predict(self, request: Any, context: Any) -> Any:
        await self._behaviour.serve(context)
        return await self._answer(request, context)

    @unary("tenfold.router.v1.RouterService/Predict")
    async def _answer(self, call: Any) -> Any:
        if self._behaviour.error is not None:
            raise self._behaviour.error
        return router_pb2.PredictResponse(served_by=router_pb2.ServedBy(tier=self._behaviour.name))


class Remembering(fallback_pb2_grpc.FallbackServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def Remember(self, request: Any, context: Any) -> Any:
        await self._behaviour.serve(context)
        return fallback_pb2.RememberResponse(kept=7)


class Features(feature_pb2_grpc.FeatureServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def GetFeatures(self, request: Any, context: Any) -> Any:
        await self._behaviour.serve(context)
        return feature_pb2.GetFeaturesResponse(views=[feature_pb2.ViewRows(view=self._behaviour.name)])


class Inference(inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        await self._behaviour.serve(context)
        return inference_pb2.ModelInferResponse(
            model_name=self._behaviour.name, raw_output_contents=request.raw_input_contents
        )

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            await self._behaviour.serve(context)
            answer = inference_pb2.ModelInferResponse(id=request.id)
            yield inference_pb2.ModelStreamInferResponse(infer_response=answer)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.arrived = asyncio.Event()

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [(span, resource.resource) for span in scope.spans]
        self.arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()


ADD = {
    "router": [("tenfold.router.v1.RouterService", Router, router_pb2_grpc.add_RouterServiceServicer_to_server)],
    "fallback": [
        ("tenfold.router.v1.RouterService", Router, router_pb2_grpc.add_RouterServiceServicer_to_server),
        ("tenfold.fallback.v1.FallbackService", Remembering, fallback_pb2_grpc.add_FallbackServiceServicer_to_server),
    ],
    "feature": [("tenfold.feature.v1.FeatureService", Features, feature_pb2_grpc.add_FeatureServiceServicer_to_server)],
    "inference": [
        (
            "inference.GRPCInferenceService",
            Inference,
            inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
        )
    ],
}


class World:
    """One gateway, what stands behind it, and a client before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.collector = Collector()
        self._stack = contextlib.AsyncExitStack()
        self._admin = f"127.0.0.1:{_free_port()}"
        self._servers: dict[str, Server] = {}
        self.envoy: asyncio.subprocess.Process | None = None

    def address(self, name: str) -> str:
        return f"unix:{self.folder}/{name}"

    async def replica(self, service: str, name: str = "", transport: str = "grpcio") -> Behaviour:
        """Starts one in this process."""
        name = name or service
        behaviour = Behaviour(name)
        offers = [Offer(full, kind(behaviour), add) for full, kind, add in ADD[service]]
        self._servers[name] = server = Server(self.address(name), offers, transport)
        await server.start()
        await server.ready()
        self._stack.push_async_callback(server.stop, lame_duck_s=0, grace_s=0)
        return behaviour

    async def says_ready(self, name: str, serving: bool) -> None:
        await self._servers[name].ready(serving)

    async def collect(self) -> Collector:
        server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self.collector, server)
        server.add_insecure_port(self.address("otlp"))
        await server.start()
        self._stack.push_async_callback(server.stop, 0)
        return self.collector

    async def process(self, name: str) -> asyncio.subprocess.Process:
        """Starts a router replica as a process, and waits until it serves."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "replica.py"),
            self.address(name),
            name,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        self._stack.push_async_callback(_end, child)
        return child

    async def start(self, mesh: str = MESH, *, tracing: bool = False, **replicas: list[str]) -> None:
        """Starts Envoy; services that are not named have one replica that bears their name."""
        named = {service: replicas.get(service, [service]) for service in meshfile.SERVICES}
        topology = Topology(
            ingress=self.address("ingress"),
            egress=self.address("egress"),
            admin=self._admin,
            replicas={service: [self.address(name) for name in names] for service, names in named.items()},
            otlp=self.address("otlp") if tracing else "",
        )
        config = bootstrap(meshfile.parse(mesh), topology)
        descriptors.check(config, envoy.binary())
        path = self.folder / "envoy.json"
        path.write_text(json.dumps(config))
        log = self._stack.enter_context((self.folder / "envoy.log").open("wb"))
        self.envoy = await asyncio.create_subprocess_exec(*envoy.command(path), stdout=log, stderr=log)
        self._stack.push_async_callback(_end, self.envoy)
        while (await self.admin("/ready")).strip() != "LIVE":
            assert self.envoy.returncode is None, (self.folder / "envoy.log").read_text()
            await asyncio.sleep(0.02)
        for listener in ("ingress", "egress"):
            channel = grpc.aio.insecure_channel(self.address(listener), options=[("grpc.enable_retries", 0)])
            self._stack.push_async_callback(channel.close)
            setattr(self, listener, channel)

    async def admin(self, path: str, method: str = "GET") -> str:
        return await asyncio.to_thread(_http, self._admin, method, path)

    async def stat(self, name: str) -> int:
        line = next(line for line in (await self.admin(f"/stats?filter=^{name}$")).splitlines() if ":" in line)
        return int(line.rpartition(":")[2])

    async def health(self, cluster: str, name: str) -> str:
        """Envoy's health flags of a replica: "healthy", or why not."""
        start = f"{cluster}::{self.folder}/{name}::health_flags::"
        return next(
            line.removeprefix(start) for line in (await self.admin("/clusters")).splitlines() if line.startswith(start)
        )

    async def until_health(self, cluster: str, name: str, healthy: bool) -> None:
        while ((await self.health(cluster, name)) == "healthy") != healthy:
            pass  # each look is a request to Envoy's admin page

    def predict(self, priority: str | None = "standard", timeout: float | None = 10, **metadata: str) -> Any:
        sent = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        if priority is not None:
            sent.append(("x-priority", priority))
        stub = router_pb2_grpc.RouterServiceStub(self.ingress)
        return stub.Predict(router_pb2.PredictRequest(model="m"), timeout=timeout, metadata=sent)

    async def answers(self, count: int, concurrent: int = 8, **options: Any) -> Counter[str]:
        """Who answered, or with which status, for `count` calls."""
        told: Counter[str] = Counter()
        left = iter(range(count))

        async def caller() -> None:
            for _ in left:
                try:
                    told[(await self.predict(**options)).served_by.tier] += 1
                except grpc.aio.AioRpcError as error:
                    told[error.code().name] += 1

        await asyncio.gather(*(caller() for _ in range(concurrent)))
        return told

    async def close(self) -> None:
        await self._stack.aclose()


def _http(address: str, method: str, path: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path)
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
    await child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def world():
    folder = Path(tempfile.mkdtemp(prefix="tf"))
    found = World(folder)
    try:
        yield found
    finally:
        await found.close()
        shutil.rmtree(folder)


@pytest.fixture
def mesh_text() -> str:
    return MESH
