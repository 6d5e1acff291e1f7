"""Asking a process whether it can work, with the protocol that it speaks."""

from __future__ import annotations

import http.client
import json
import socket

from deploy.local.state import Component, Probe

PATIENCE_S = 1.0


def complaint(component: Component) -> str:
    """Why it cannot work yet, in a few words; empty if it can. Waits for PATIENCE_S at most."""
    ask = {Probe.PING: _ping, Probe.GRPC: _grpc, Probe.READY: _ready}[component.probe]
    try:
        return ask(component.asked_at)
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__


def valkey_says(path: str, *command: str) -> str:
    """The first line of Valkey's answer at a Unix socket, with its type: "+PONG", ":0". Raises OSError."""
    words = [f"${len(word.encode())}\r\n{word}\r\n" for word in command]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(path)
        connection.sendall(f"*{len(words)}\r\n{''.join(words)}".encode())
        answer = b""
        while not answer.endswith(b"\r\n"):
            more = connection.recv(4096)
            if not more:
                raise ConnectionResetError("Valkey closed the connection")
            answer += more
    return answer.decode().splitlines()[0]


def _ping(address: str) -> str:
    answer = valkey_says(address.removeprefix("unix:"), "PING")
    return "" if answer == "+PONG" else answer.lstrip("-")  # -LOADING while it reads its file


def _grpc(address: str) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            ask = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # its stubs leave it out
            answer = ask(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            code = error.code()
            return f"health: {code.name.lower().replace('_', ' ')}"
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return "" if serving else "not serving yet"


def _ready(address: str) -> str:
    status, body = admin(address, "GET", "/ready")
    return "" if status == 200 else body.strip() or f"status {status}"


def unseen(address: str) -> list[str]:
    """Members of the gateway's clusters that its own health checks have not found well: "router_critical unix:/...".

    address: of the admin page. Raises OSError where it does not answer.
    """
    _, body = admin(address, "GET", "/clusters?format=json")
    return sorted(
        f"{cluster['name']} {_where(host['address'])}"
        for cluster in json.loads(body).get("cluster_statuses", [])
        for host in cluster.get("host_statuses", [])
        if host.get("health_status", {}).get("failed_active_health_check")
    )


def _where(address: dict[str, dict[str, object]]) -> str:
    if "pipe" in address:
        return f"unix:{address['pipe']['path']}"
    found = address.get("socket_address", {})
    return f"{found.get('address')}:{found.get('port_value')}"


def admin(address: str, method: str, path: str) -> tuple[int, str]:
    """Status and body of Envoy's admin page at "host:port". Raises OSError where it does not answer."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"Envoy's admin page: {error}") from error
    finally:
        connection.close()
