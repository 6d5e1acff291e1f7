"""Envoy's bootstrap configuration, from the mesh's description and the addresses of one stack.

Plain dicts, as Envoy reads them from JSON. `gateway.descriptors.check` knows whether every field exists, and
`gateway.envoy.validate` whether Envoy accepts them.
"""

from __future__ import annotations

import copy

from gateway import tracing
from gateway.addresses import AddressError, Config, loopback_address
from gateway.clusters import clusters
from gateway.listeners import egress, ingress
from gateway.topology import Topology
from services.mesh.meshfile import MeshFile

MAX_CLIENT_CONNECTIONS = 10_000

_CONNECTION_LIMIT = "envoy.resource_monitors.global_downstream_max_connections"
_CONNECTION_LIMIT_TYPE = "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"

_RUNTIME: Config = {
    # Calls with short deadlines look like a rapid-reset attack, and under overload Envoy would cut whole
    # connections of honest clients. Ours are trusted.
    "overload.premature_reset_total_stream_count": 4_294_967_295,
    "overload.premature_reset_min_stream_lifetime_seconds": 0,
    **tracing.RUNTIME,
}


class ConfigError(ValueError):
    """No configuration can be made of this; the message names what was wrong and what is allowed."""


def bootstrap(mesh: MeshFile, topology: Topology) -> Config:
    """envoy.config.bootstrap.v3.Bootstrap. Raises ConfigError naming the address that cannot be used."""
    try:
        admin = loopback_address(topology.admin)
    except AddressError as error:
        raise ConfigError(f"admin: {error}") from error
    try:
        resources = {
            "listeners": [ingress(mesh, topology), egress(mesh, topology)],
            "clusters": clusters(mesh, topology),
        }
    except AddressError as error:
        raise ConfigError(str(error)) from error
    found = {
        "node": {"id": "gateway", "cluster": mesh.name},
        "admin": {"address": admin, "ignore_global_conn_limit": True},
        # the last layer is set by hand on the admin page: circuit_breakers.<cluster>.default.max_requests and others
        "layered_runtime": {
            "layers": [{"name": "static", "static_layer": _RUNTIME}, {"name": "admin", "admin_layer": {}}]
        },
        "stats_flush_on_admin": True,  # nothing is to be done for statistics that nobody reads
        "overload_manager": {"resource_monitors": [_connection_limit()]},
        "static_resources": resources,
    }
    return copy.deepcopy(found)  # so that what a caller changes stays the caller's


def _connection_limit() -> Config:
    limit = {
        "@type": f"type.googleapis.com/{_CONNECTION_LIMIT_TYPE}",
        "max_active_downstream_connections": MAX_CLIENT_CONNECTIONS,
    }
    return {"name": _CONNECTION_LIMIT, "typed_config": limit}
