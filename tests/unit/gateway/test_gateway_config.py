import json
from pathlib import Path

import pytest

from gateway.config import ConfigError, bootstrap
from gateway.topology import Topology
from services.mesh import meshfile

MESH = meshfile.load(Path("deploy/flights/tenfold.toml"))


def topology(**changes):
    replicas = {service: [f"unix:/tmp/tf/{service}-0"] for service in meshfile.SERVICES}
    replicas |= changes.pop("replicas", {})
    return Topology(
        **{
            "ingress": "127.0.0.1:8080",
            "egress": "unix:/tmp/tf/egress",
            "admin": "127.0.0.1:9901",
            "replicas": replicas,
            **changes,
        }
    )


def made(**changes):
    return bootstrap(MESH, topology(**changes))


def clusters(config):
    return {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}


def managers(config):
    return {
        listener["name"]: listener["filter_chains"][0]["filters"][0]["typed_config"]
        for listener in config["static_resources"]["listeners"]
    }


def routes(config, listener):
    return managers(config)[listener]["route_config"]["virtual_hosts"][0]["routes"]


def test_it_is_plain_json():
    config = made(otlp="127.0.0.1:4317")
    assert json.loads(json.dumps(config)) == config


def test_one_configuration_shares_nothing_with_the_next():
    first = made()
    first["static_resources"]["clusters"][0]["load_balancing_policy"]["policies"].clear()
    assert made() != first


@pytest.mark.parametrize("service", ["router", "inference"])
@pytest.mark.parametrize("priority", ["critical", "standard", "background"])
def test_each_priority_has_its_cap_over_the_same_replicas(service, priority):
    cluster = clusters(made())[f"{service}_{priority}"]
    (thresholds,) = cluster["circuit_breakers"]["thresholds"]
    caps = {entry.name: entry.max_in_flight for entry in MESH.priorities}
    assert thresholds["max_requests"] == caps[priority]
    first = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [entry["endpoint"]["address"]["pipe"]["path"] for entry in first] == [f"/tmp/tf/{service}-0"]


def test_fallback_stands_behind_the_router_and_behind_nobody_else():
    found = clusters(made())
    levels = {name: len(cluster["load_assignment"]["endpoints"]) for name, cluster in found.items()}
    assert {name for name, count in levels.items() if count == 2} == {
        "router_critical",
        "router_standard",
        "router_background",
    }


def test_every_route_leads_to_a_cluster_that_is_there():
    config = made()
    targets = {route["route"]["cluster"] for name in ("ingress", "egress") for route in routes(config, name)}
    assert targets == set(clusters(config))


def test_no_route_adds_a_timeout_of_its_own_and_every_one_honours_the_callers():
    for listener in ("ingress", "egress"):
        for route in routes(made(), listener):
            assert route["route"]["timeout"] == "0s"
            assert route["route"]["max_stream_duration"]["grpc_timeout_header_max"] == "0s"


def test_the_default_deadline_is_the_mesh_files():
    added = [
        option["header"]["value"]
        for route in routes(made(), "ingress")
        for option in route.get("request_headers_to_add", ())
        if option["header"]["key"] == "grpc-timeout"
    ]
    assert set(added) == {"2000m"}


def test_the_retry_budget_and_attempts_are_the_mesh_files():
    text = Path("deploy/flights/tenfold.toml").read_text()
    text = text.replace("[gateway]", "[gateway]\nretries = { attempts = 3, budget_percent = 25 }")
    config = bootstrap(meshfile.parse(text), topology())
    (thresholds,) = clusters(config)["feature"]["circuit_breakers"]["thresholds"]
    assert thresholds["retry_budget"]["budget_percent"] == {"value": 25}
    assert {route["route"]["retry_policy"]["num_retries"] for route in routes(config, "egress")} == {2}


@pytest.mark.parametrize("code", ["resource", "deadline", "5xx", "internal", "cancelled"])
def test_what_must_not_be_retried_is_not(code):
    for listener in ("ingress", "egress"):
        for route in routes(made(), listener):
            assert code not in route["route"].get("retry_policy", {}).get("retry_on", "")


def test_without_a_collector_there_is_no_tracing():
    config = made()
    assert not any("tracing" in manager for manager in managers(config).values())
    assert "otlp" not in clusters(config)


def test_clients_are_traced_and_services_are_not():
    found = managers(made(otlp="127.0.0.1:4317"))
    assert "tracing" in found["ingress"]
    assert "tracing" not in found["egress"]


def test_replicas_known_by_name_are_looked_up():
    found = clusters(made(replicas={"feature": ["feature:50051"]}))
    assert found["feature"]["type"] == "STRICT_DNS"
    assert found["inference"]["type"] == "STATIC"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"admin": "0.0.0.0:9901"}, "admin: must be on loopback"),
        ({"ingress": "gateway:8080"}, "gateway:8080"),
        ({"egress": "unix:egress"}, "unix:egress"),
        ({"otlp": "collector"}, "collector"),
        ({"replicas": {"feature": ["feature"]}}, "feature"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        made(**changes)
