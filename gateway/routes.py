"""Which call goes where, how long it may take and how often it is tried."""

from __future__ import annotations

import math

from gateway.addresses import Config
from gateway.clusters import FALLBACK, FEATURE, INFERENCE, ROUTER, cluster_of
from services.mesh import attributes
from services.mesh.meshfile import MeshFile, Retries
from services.resilience.call import Priority

ROUTER_SERVICE = "/tenfold.router.v1.RouterService/"
INFERENCE_SERVICE = "/inference.GRPCInferenceService/"
FEATURE_SERVICE = "/tenfold.feature.v1.FeatureService/"
FALLBACK_SERVICE = "/tenfold.fallback.v1.FallbackService/"
STREAMS = f"{INFERENCE_SERVICE}ModelStreamInfer"


def ingress_routes(mesh: MeshFile, routers: int) -> Config:
    """envoy.config.route.v3.RouteConfiguration for calls from clients. routers: how many there are."""
    default_ms = math.ceil(mesh.gateway.default_timeout_ms)
    failover = _retried(mesh.gateway.retries, failover_after=min(routers, 2))
    retried = _retried(mesh.gateway.retries)
    return _routes(
        "ingress",
        [
            *_by_priority({"prefix": ROUTER_SERVICE}, ROUTER, failover, default_ms),
            # a stream lasts as long as its client wants, and cannot be sent again
            *_by_priority({"path": STREAMS}, INFERENCE, _ONCE, None),
            *_by_priority({"prefix": INFERENCE_SERVICE}, INFERENCE, retried, default_ms),
            # a client that looks whether anyone is there must not be shed with the crowd
            _route({"prefix": "/grpc.health.v1.Health/"}, cluster_of(ROUTER, Priority.CRITICAL), failover),
            _route({"prefix": "/grpc.reflection."}, cluster_of(ROUTER, Priority.STANDARD), _ONCE),
        ],
    )


def egress_routes(mesh: MeshFile) -> Config:
    """envoy.config.route.v3.RouteConfiguration for calls between services. Nothing is changed on their way."""
    retried = _retried(mesh.gateway.retries)
    return _routes(
        "egress",
        [
            _route({"prefix": prefix}, service, retried)
            for prefix, service in (
                (FEATURE_SERVICE, FEATURE),
                (INFERENCE_SERVICE, INFERENCE),
                (ROUTER_SERVICE, FALLBACK),
                (FALLBACK_SERVICE, FALLBACK),
            )
        ],
    )


_ONCE: Config = {}


def _routes(name: str, routes: list[Config]) -> Config:
    return {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]}


def _by_priority(match: Config, service: str, retries: Config, default_ms: int | None) -> list[Config]:
    """A route for each priority; what is not exactly critical or standard becomes background."""
    named = [
        _route(match | {"headers": [_is(priority)]}, cluster_of(service, priority), retries, default_ms)
        for priority in (Priority.CRITICAL, Priority.STANDARD)
    ]
    rest = _route(match, cluster_of(service, Priority.BACKGROUND), retries, default_ms)
    stamp = header(attributes.PRIORITY, Priority.BACKGROUND.label, "OVERWRITE_IF_EXISTS_OR_ADD")
    rest["request_headers_to_add"] = [*rest.get("request_headers_to_add", []), stamp]
    return [*named, rest]


def _is(priority: Priority) -> Config:
    return {"name": attributes.PRIORITY, "string_match": {"exact": priority.label}}


def _route(match: Config, cluster: str, retries: Config, default_ms: int | None = None) -> Config:
    """default_ms: the deadline of a call that brings none, milliseconds; None to leave it without."""
    route: Config = {
        "match": match,
        "route": {
            "cluster": cluster,
            "timeout": "0s",  # the deadline is the client's, and nothing else
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},  # 0s: whatever grpc-timeout says
            **retries,
        },
    }
    if default_ms is not None:
        route["route"]["max_stream_duration"]["max_stream_duration"] = f"{default_ms / 1000:.3f}s"
        route["request_headers_to_add"] = [header("grpc-timeout", f"{default_ms}m", "ADD_IF_ABSENT")]
    return route


def _retried(retries: Retries, *, failover_after: int = 0) -> Config:
    """What may be tried again: only calls that reached nobody, or whose callee says that it cannot serve.

    RESOURCE_EXHAUSTED is not among them: a shed that is retried at once is a storm.
    failover_after: tries on the first level of the cluster before the next level is asked; 0 for never. With several
    routers one that dies is made up for by another, and only then by fallback: a whole answer before a degraded one.
    """
    if retries.attempts == 1:
        return _ONCE
    policy: Config = {
        "retry_on": "connect-failure,refused-stream,reset,unavailable",
        "num_retries": max(retries.attempts - 1, failover_after),
        "retry_back_off": {"base_interval": "0.002s", "max_interval": "0.02s"},
        "retry_host_predicate": [_typed("envoy.retry_host_predicates.previous_hosts", _PREVIOUS_HOSTS)],
        "host_selection_retry_max_attempts": 16,  # of two replicas the same one is drawn this often once in 65,536
    }
    if failover_after:
        policy["retry_priority"] = _typed("envoy.retry_priorities.previous_priorities", _PREVIOUS_PRIORITIES)
        policy["retry_priority"]["typed_config"]["update_frequency"] = failover_after
    return {"retry_policy": policy}


_PREVIOUS_HOSTS = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
_PREVIOUS_PRIORITIES = "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"


def _typed(name: str, message: str) -> Config:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{message}"}}


def header(key: str, value: str, append_action: str) -> Config:
    """envoy.config.core.v3.HeaderValueOption."""
    return {"header": {"key": key, "value": value}, "append_action": append_action}
