"""Whom the gateway calls: replicas of the services, how their health is known and how much they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.addresses import Config, envoy_address, needs_dns
from gateway.topology import Topology
from services.mesh.meshfile import MeshFile
from services.resilience.call import Priority

ROUTER, INFERENCE, FEATURE, FALLBACK, OTLP = "router", "inference", "feature", "fallback", "otlp"

# what each service's own health is asked by; fallback answers for the router, so it is asked as one
HEALTH_NAMES = {
    ROUTER: "tenfold.router.v1.RouterService",
    INFERENCE: "inference.GRPCInferenceService",
    FEATURE: "tenfold.feature.v1.FeatureService",
    FALLBACK: "tenfold.router.v1.RouterService",
}

HTTP2: Config = {
    "max_concurrent_streams": 16_384,  # in-flight caps refuse long before; a client must not wait for a stream unseen
    "initial_stream_window_size": 2**20,
    "initial_connection_window_size": 16 * 2**20,  # a whole message, so that one never waits for another's window
}

# Caps of calls between services. They bound memory and are not meant to shed: that is done at the ingress.
EGRESS_MAX_REQUESTS = 8_192

_PROBE_INTERVAL = "0.25s"  # within the 0.3 s that a stopping service still answers while it says NOT_SERVING
_PROBE_INTERVAL_UNUSED = "2s"  # of a cluster that has had no call yet: nobody waits to learn of its health
_PROBE_TIMEOUT = "1s"  # a busy machine is not a dead one
# percent; otherwise a level with half of its members sick sends a third of its calls to the next one
_ALL_TO_THE_FIRST_LEVEL = 100_000
_MIN_RETRIES = 3  # concurrent retries that the budget always allows


def cluster_of(service: str, priority: Priority) -> str:
    """The name of the ingress cluster; its cap is the runtime key circuit_breakers.<name>.default.max_requests."""
    return f"{service}_{priority.label}"


@dataclass(frozen=True, slots=True)
class Caps:
    """max_requests: calls in flight; more overflow. max_retries: concurrent retries; None for the mesh's budget."""

    max_requests: int
    max_retries: int | None = None


def clusters(mesh: MeshFile, topology: Topology) -> list[Config]:
    """Every cluster of the gateway."""
    budget = mesh.gateway.retries.budget_percent
    replicas = topology.replicas
    found: list[Config] = []
    for priority in sorted(Priority, reverse=True):
        cap = mesh.priority(priority).max_in_flight
        # A call whose router died goes on to fallback. That is no retry of the same work on the same service, so the
        # budget does not bound it: the cap does, and fallback's own limit.
        failover = Caps(cap, max_retries=cap)
        name = cluster_of(ROUTER, priority)
        found.append(_cluster(name, ROUTER, [replicas[ROUTER], replicas[FALLBACK]], failover, budget))
        name = cluster_of(INFERENCE, priority)
        found.append(_cluster(name, INFERENCE, [replicas[INFERENCE]], Caps(cap), budget))
    loose = Caps(EGRESS_MAX_REQUESTS)
    found += [_cluster(name, name, [replicas[name]], loose, budget) for name in (FEATURE, INFERENCE, FALLBACK)]
    if topology.otlp:
        found.append(_base(OTLP, [[topology.otlp]]))
    return found


def _cluster(name: str, service: str, levels: Sequence[Sequence[str]], caps: Caps, budget_percent: float) -> Config:
    """levels: addresses by failover level; a level is used when the one before has no healthy member."""
    return _base(name, levels) | {
        "load_balancing_policy": _LEAST_REQUEST,
        "common_lb_config": {
            # with no healthy member left, sending to the sick ones would only delay the failover
            "healthy_panic_threshold": {"value": 0},
            "update_merge_window": "0s",  # a change of health counts now, not up to a second later
        },
        "health_checks": [_health_check(HEALTH_NAMES[service])],
        "outlier_detection": _outliers(levels),
        "circuit_breakers": {"thresholds": [_thresholds(caps, budget_percent)]},
    }


def _base(name: str, levels: Sequence[Sequence[str]]) -> Config:
    by_name = any(needs_dns(address) for level in levels for address in level)
    dns: Config = {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED", "dns_refresh_rate": "2s"}
    return {
        "name": name,
        "connect_timeout": "0.5s",
        "load_assignment": {
            "cluster_name": name,
            "policy": {"overprovisioning_factor": _ALL_TO_THE_FIRST_LEVEL},
            "endpoints": [
                {
                    "priority": level,
                    "lb_endpoints": [{"endpoint": {"address": envoy_address(address)}} for address in addresses],
                }
                for level, addresses in enumerate(levels)
            ],
        },
        "typed_extension_protocol_options": {_HTTP_OPTIONS: _UPSTREAM_HTTP},
    } | (dns if by_name else {"type": "STATIC"})


def _health_check(service_name: str) -> Config:
    return {
        "interval": _PROBE_INTERVAL,
        "no_traffic_interval": _PROBE_INTERVAL,
        "no_traffic_healthy_interval": _PROBE_INTERVAL_UNUSED,
        "timeout": _PROBE_TIMEOUT,
        # NOT_SERVING counts at once; only silence has to be heard twice
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": service_name},
    }


def _outliers(levels: Sequence[Sequence[str]]) -> Config:
    """Leaves a replica alone for a while whose connections fail or break, or that answers nothing but UNAVAILABLE.

    Envoy counts DEADLINE_EXCEEDED like UNAVAILABLE, so clients in a hurry look like a sick replica. Answers therefore
    count only where another replica of the service remains, only many in a row, and eject at most every second one.
    Elsewhere a retry at the next level, the callers' own breakers and health checks have to do.
    """
    several = len(levels) == 1 and (len(levels[0]) > 1 or needs_dns(levels[0][0]))
    return {
        "interval": "0.5s",
        "base_ejection_time": "1s",
        "max_ejection_time": "4s",
        "max_ejection_percent": 50 if several else 100,
        # probes come every quarter of a second and would undo each ejection of a replica that is well but failing
        "successful_active_health_check_uneject_host": False,
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "consecutive_gateway_failure": 50,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_consecutive_gateway_failure": 100 if several else 0,
        # any 5xx would be too much: a client could eject a replica by asking for methods that it does not have
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "enforcing_failure_percentage": 0,
        "enforcing_local_origin_success_rate": 0,
        "enforcing_failure_percentage_local_origin": 0,
    }


def _thresholds(caps: Caps, budget_percent: float) -> Config:
    limits: Config = {
        "max_requests": caps.max_requests,
        "max_pending_requests": caps.max_requests,
        "max_connections": 1024,
        "track_remaining": True,
    }
    if caps.max_retries is not None:
        return limits | {"max_retries": caps.max_retries}
    return limits | {
        "retry_budget": {"budget_percent": {"value": budget_percent}, "min_retry_concurrency": _MIN_RETRIES}
    }


_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UPSTREAM_HTTP: Config = {
    "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
    "explicit_http_config": {"http2_protocol_options": HTTP2},
}

_LEAST_REQUEST: Config = {
    "policies": [
        {
            "typed_extension_config": {
                "name": "envoy.load_balancing_policies.least_request",
                "typed_config": {
                    "@type": "type.googleapis.com/"
                    "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest",
                    "choice_count": 2,
                },
            }
        }
    ]
}
