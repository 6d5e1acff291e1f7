"""Against the descriptors of the Envoy that is installed."""

import copy
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from gateway import descriptors, envoy
from gateway.config import bootstrap
from gateway.topology import Topology
from services.mesh import meshfile


@pytest.fixture(scope="module")
def config():
    replicas = {service: [f"unix:/tmp/tf/{service}"] for service in meshfile.SERVICES}
    where = Topology("127.0.0.1:8080", "unix:/tmp/tf/egress", "127.0.0.1:9901", replicas, "127.0.0.1:4317")
    return bootstrap(meshfile.load(Path("deploy/flights/tenfold.toml")), where)


def test_our_own_configuration_is_known(config):
    descriptors.check(config, envoy.binary())


def _cluster(config):
    return config["static_resources"]["clusters"][2]


def _manager(config):
    return config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


@pytest.mark.parametrize(
    ("spoil", "where", "what"),
    [
        (lambda config: _cluster(config).update(nam="x"), "Bootstrap.static_resources.clusters[2]", '"nam"'),
        (lambda config: _cluster(config).update(type="FAST"), "clusters[2].type", "FAST"),
        (lambda config: _cluster(config).update(connect_timeout="soon"), "clusters[2].connect_timeout", "soon"),
        (
            lambda config: _manager(config).update(stat_prefx="x"),
            "listeners[0].filter_chains[0].filters[0].typed_config",
            '"stat_prefx"',
        ),
        (
            lambda config: _manager(config)["tracing"]["provider"]["typed_config"].update(servce_name="x"),
            "typed_config.tracing.provider.typed_config",
            '"servce_name"',
        ),
    ],
)
def test_what_envoy_does_not_know_is_named_with_its_place_inside_any_too(config, spoil, where, what):
    spoiled = copy.deepcopy(config)
    spoil(spoiled)
    with pytest.raises(descriptors.UnknownField) as error:
        descriptors.check(spoiled, envoy.binary())
    place, _, complaint = str(error.value).partition(": ")
    assert place.endswith(where)
    assert what in complaint


def test_the_binary_is_read_once(tmp_path, config):
    binary = _little_binary(tmp_path)
    descriptors.api(binary, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    descriptors.api.cache_clear()
    descriptors.api(binary, tmp_path / "cache")
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    binary = _little_binary(tmp_path)
    descriptors.api(binary, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] if damage is None else damage)
    descriptors.api.cache_clear()
    descriptors.api(binary, tmp_path / "cache").check({"name": "x"}, "toy.Toy")
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    descriptors.api(_little_binary(tmp_path), tmp_path / "file" / "cache").check({"name": "x"}, "toy.Toy")


def _little_binary(folder):
    field = descriptor_pb2.FieldDescriptorProto(name="name", number=1, type=9, label=1)
    message = descriptor_pb2.DescriptorProto(name="Toy", field=[field])
    file = descriptor_pb2.FileDescriptorProto(name="toy/toy.proto", package="toy", message_type=[message])
    path = folder / "program"
    path.write_bytes(b"\x7fELF\x00\x00" + file.SerializeToString() + b"\x00\x00 more of the program")
    return path
