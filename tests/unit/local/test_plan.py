from pathlib import Path

import pytest

from deploy.local import plan
from deploy.local.folders import RunFolder
from deploy.local.ports import Ports
from deploy.local.state import Component
from services.mesh.meshfile import SERVICES, MeshFile, parse

DEMONSTRATION = Path(__file__).parents[3] / "deploy/flights/tenfold.toml"


def mesh(**replacements: str) -> MeshFile:
    text = DEMONSTRATION.read_text()
    for old, new in replacements.items():
        text = text.replace(f'name = "{old}"', f'name = "{old}"\n{new}')
    return parse(text)


def planned(mesh: MeshFile, tmp_path: Path, *, tcp: bool = False) -> dict[str, Component]:
    sockets, run = Path("/tmp/tf-x"), RunFolder.of("s", tmp_path)
    with Ports() as ports:
        topology = plan.addresses(mesh, sockets, ports, port=None, tcp=tcp)
    found = plan.components(mesh, DEMONSTRATION, topology, run, sockets, tmp_path)
    assert [c.stage for c in found] == sorted(c.stage for c in found)
    return {component.name: component for component in found}


def test_every_service_has_as_many_processes_as_the_mesh_file_says(tmp_path: Path) -> None:
    names = list(planned(mesh(inference="replicas = 3"), tmp_path))
    assert names == [
        "valkey-0", "traces-0", "feature-0", "inference-0", "inference-1", "inference-2", "fallback-0", "gateway-0",
        "router-0",
    ]  # fmt: skip


def test_a_service_is_told_where_it_is_and_what_it_needs(tmp_path: Path) -> None:
    found = planned(mesh(), tmp_path)
    inference, feature, fallback = (found[f"{name}-0"].environ for name in ("inference", "feature", "fallback"))
    assert inference["TENFOLD_TRANSPORT"] == "native"
    assert inference["TENFOLD_MODELS"] == str(tmp_path / "flights/models")
    assert inference["TENFOLD_LISTEN"] == "unix:/tmp/tf-x/inference-0.sock"
    assert fallback["TENFOLD_TRANSPORT"] == "grpcio"
    assert feature["TENFOLD_STORE"] == "unix:///tmp/tf-x/valkey.sock"
    assert fallback["TENFOLD_ARTEFACTS"] == str(tmp_path / "flights")
    assert all(environ["TENFOLD_DIE_WITH_PARENT"] == "1" for environ in (inference, feature, fallback))


@pytest.mark.parametrize("tcp", [False, True])
def test_no_two_processes_share_an_address(tmp_path: Path, tcp: bool) -> None:
    found = planned(mesh(inference="replicas = 3", router="replicas = 2"), tmp_path, tcp=tcp).values()
    addresses = [component.address for component in found]
    assert len(set(addresses)) == len(addresses)
    services = [component.address for component in found if component.service in SERVICES]
    assert [address.startswith("unix:") for address in services] == [not tcp] * 7


def test_the_online_store_drops_nothing_and_listens_on_no_port(tmp_path: Path) -> None:
    command = " ".join(planned(mesh(), tmp_path)["valkey-0"].command)
    assert "--port 0 " in command
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes --appendfsync everysec" in command
