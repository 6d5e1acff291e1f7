import pytest

from gateway import topology
from gateway.topology import Topology, TopologyError
from services.mesh.meshfile import SERVICES

REPLICAS = {service: [f"unix:/tmp/tf/{service}-0"] for service in SERVICES}


def test_what_was_saved_is_loaded(tmp_path):
    saved = Topology("127.0.0.1:1", "unix:/tmp/tf/egress", "127.0.0.1:2", REPLICAS, otlp="unix:/tmp/tf/otlp")
    topology.save(saved, tmp_path / "topology.json")
    assert topology.load(tmp_path / "topology.json") == saved


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "topology.json"),
        ('{"ingress": 1}', "Expected `str`"),
        ('{"ingress": "a:1", "egress": "a:2", "admin": "a:3", "replicas": {}}', "feature, router"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, says):
    path = tmp_path / "topology.json"
    path.write_text(text)
    with pytest.raises(TopologyError, match=says) as error:
        topology.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TopologyError, match="No such file"):
        topology.load(tmp_path / "topology.json")


@pytest.mark.parametrize("replicas", [REPLICAS | {"router": []}, REPLICAS | {"rooter": ["a:1"]}, {}])
def test_every_service_has_a_replica(replicas):
    with pytest.raises(TopologyError, match="replicas"):
        Topology("a:1", "a:2", "a:3", replicas)
