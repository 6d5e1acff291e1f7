"""Where the gateway is called, and what it says when it answers itself."""

from __future__ import annotations

from gateway.addresses import Config, listener_address
from gateway.clusters import HTTP2, ROUTER
from gateway.routes import egress_routes, header, ingress_routes
from gateway.topology import Topology
from gateway.tracing import tracing
from services.mesh import attributes
from services.mesh.meshfile import MeshFile
from services.resilience.errors import Reason

PUSHBACK_MS = 100  # as `services.resilience.errors.Refused` says unless told otherwise

_TYPE = "type.googleapis.com/"
_HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "envoy.extensions.filters.http.router.v3.Router"
_UUID = "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"
_EARLY = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"


def ingress(mesh: MeshFile, topology: Topology) -> Config:
    """The listener that clients call."""
    manager = _manager("ingress", ingress_routes(mesh, len(topology.replicas[ROUTER]))) | {
        "early_header_mutation_extensions": [_CLIENTS_MAY_NOT],
        # the trace id decides what is sampled; a request id would only be one more header
        "request_id_extension": {
            "typed_config": {"@type": _TYPE + _UUID, "use_request_id_for_trace_sampling": False},
        },
    }
    if topology.otlp:
        manager["tracing"] = tracing(mesh.gateway.trace_sample)
    # a draining gateway closes this listener alone: calls in flight still need the egress
    return _listener("ingress", topology.ingress, manager) | {"traffic_direction": "INBOUND"}


def egress(mesh: MeshFile, topology: Topology) -> Config:
    """The listener through which services call each other: no header is changed, nothing is recorded."""
    manager = _manager("egress", egress_routes(mesh))
    # clients that use up the gateway's connections must not cut the services from each other
    return _listener("egress", topology.egress, manager) | {"ignore_global_conn_limit": True}


def _listener(name: str, address: str, manager: Config) -> Config:
    manager = {"@type": _TYPE + _HCM} | manager
    http = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {"name": name, "address": listener_address(address), "filter_chains": [{"filters": [http]}]}


def _manager(name: str, routes: Config) -> Config:
    """A connection manager that adds nothing of its own to what passes."""
    router = {"@type": _TYPE + _ROUTER, "suppress_envoy_headers": True, "dynamic_stats": False}
    return {
        "stat_prefix": name,
        "codec_type": "HTTP2",
        "http2_protocol_options": HTTP2,
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "local_reply_config": {"mappers": _LOCAL_REPLIES},
        "route_config": routes,
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }


def _reply(flags: list[str], message: str = "", *headers: tuple[str, str]) -> Config:
    """An answer of Envoy's own, told from others by its response flags. `message` becomes grpc-message."""
    mapper: Config = {
        "filter": {"response_flag_filter": {"flags": flags}},
        "headers_to_add": [header(key, value, "OVERWRITE_IF_EXISTS_OR_ADD") for key, value in headers],
    }
    if message:
        mapper["body_format_override"] = {"text_format_source": {"inline_string": message}}
    return mapper


_REFUSED_FOR_LOAD = (
    ("grpc-status", "8"),
    (attributes.PUSHBACK_MS, str(PUSHBACK_MS)),
    (attributes.SHED_REASON, Reason.OVERLOADED.label),
)

# The first that matches counts. A failure whose retry found no room has the flag of an overflow too (UO), and is
# still a failure. No reason is given for those: only a callee that is alive gives one.
_LOCAL_REPLIES = [
    _reply(["UF", "UC", "UR", "LR", "UH"]),
    _reply(["UO"], "as many %REQ(x-priority)% requests as may be are in flight already", *_REFUSED_FOR_LOAD),
    _reply(["NR"], "no such service: %REQ(:path):128%"),
]

# What a client might use to change how the gateway and the services treat others, and itself.
_CLIENTS_MAY_NOT: Config = {
    "name": "envoy.http.early_header_mutation.header_mutation",
    "typed_config": {
        "@type": _TYPE + _EARLY,
        "mutations": [
            {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
            {"remove": attributes.DEGRADED_REASON},
            {"append": header(attributes.TENANT, "public", "ADD_IF_ABSENT")},
        ],
    },
}
