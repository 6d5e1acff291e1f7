import json
import stat

import pytest

from gateway import envoy, topology
from gateway.__main__ import main
from gateway.topology import Topology
from services.mesh.meshfile import SERVICES

MESH = "deploy/flights/tenfold.toml"


@pytest.fixture
def where(tmp_path):
    path = tmp_path / "topology.json"
    replicas = {service: [f"unix:/tmp/tf/{service}"] for service in SERVICES}
    topology.save(Topology("127.0.0.1:8080", "unix:/tmp/tf/egress", "127.0.0.1:9901", replicas), path)
    return str(path)


def test_render_writes_what_envoy_reads(where, tmp_path, capsys):
    out = tmp_path / "envoy.json"
    assert main(["render", "--mesh", MESH, "--topology", where, "--out", str(out)]) == 0
    assert main(["render", "--mesh", MESH, "--topology", where]) == 0
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out)


def test_envoy_accepts_what_is_rendered(where, capsys):
    assert main(["validate", "--mesh", MESH, "--topology", where]) == 0
    assert "accepts" in capsys.readouterr().out


def test_a_wrong_file_is_one_line_and_status_2(where, tmp_path, capsys):
    assert main(["render", "--mesh", str(tmp_path / "none.toml"), "--topology", where]) == 2
    assert main(["render", "--mesh", MESH, "--topology", str(tmp_path / "none.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_envoys_complaint_is_passed_on(tmp_path):
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps({"static_resources": {"clusters": [{"name": ""}]}}))
    with pytest.raises(envoy.EnvoyError, match="Name"):
        envoy.validate(path)


def test_an_envoy_that_hangs_is_given_up(tmp_path, monkeypatch):
    program = tmp_path / "envoy"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TENFOLD_ENVOY", str(program))
    with pytest.raises(envoy.EnvoyError, match=r"within 0\.1 s"):
        envoy.validate(tmp_path / "envoy.json", timeout_s=0.1)


def test_a_chosen_envoy_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("TENFOLD_ENVOY", "/nowhere/envoy")
    with pytest.raises(envoy.EnvoyError, match="TENFOLD_ENVOY must name a program, got '/nowhere/envoy'"):
        envoy.binary()


def test_the_command_shares_nothing_with_another_stack(tmp_path):
    argv = envoy.command(tmp_path / "envoy.json", concurrency=2)
    assert "--disable-hot-restart" in argv
    assert argv[argv.index("--concurrency") + 1] == "2"
