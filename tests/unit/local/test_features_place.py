from pathlib import Path

import pytest
import typer

from deploy.local import state
from deploy.local.commands import DEMONSTRATION
from deploy.local.features import place_of
from deploy.local.folders import RunFolder
from deploy.local.state import State
from gateway.topology import Topology
from services.mesh.meshfile import SERVICES


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TENFOLD_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def mesh_at(folder: Path, *changes: tuple[str, str]) -> Path:
    """The demonstration's mesh file, changed."""
    text = DEMONSTRATION.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tenfold.toml").write_text(text)
    return folder / "tenfold.toml"


def start(home: Path, mesh_file: Path, mesh: str) -> None:
    """As if a stack ran that this process holds."""
    run = RunFolder.of("default", home)
    run.make()
    replicas = {name: [f"unix:/{name}"] for name in SERVICES}
    topology = Topology("127.0.0.1:8080", "unix:/e", "127.0.0.1:9901", replicas, "unix:/o")
    holder = state.starter()
    state.write(
        run, State("default", mesh, str(mesh_file), str(home), 1, holder, "/s", "/s/c", "unix:///v", topology, [])
    )


def test_without_a_stack_there_is_no_store_and_it_is_told_how_to_get_one(home: Path) -> None:
    place = place_of(None, "default")
    assert (place.mesh, place.definitions, place.store) == ("flights", "deploy.flights.views", "")
    assert place.offline == str(home / "flights" / "offline")
    assert "start it with `tenfold up`" in place.why
    assert "--stack mine" in place_of(None, "mine").why


def test_a_running_stack_tells_its_own_mesh_home_and_store(home: Path, tmp_path: Path) -> None:
    file = mesh_at(
        tmp_path / "elsewhere",
        ('\nname = "flights"\n', '\nname = "trips"\n'),
        ('definitions = "deploy.flights.views"', 'definitions = "views.py"\noffline = "s3://bucket/events"'),
    )
    start(home, file, "trips")
    place = place_of(None, "default")
    assert (place.mesh, place.store, place.why) == ("trips", "unix:///v", "")
    assert place.definitions == str(tmp_path / "elsewhere" / "views.py")
    assert place.offline == "s3://bucket/events"


def test_another_mesh_does_not_get_the_store_of_the_one_that_runs(home: Path, tmp_path: Path) -> None:
    start(home, DEMONSTRATION, "flights")
    place = place_of(mesh_at(tmp_path / "mine", ('\nname = "flights"\n', '\nname = "trips"\n')), "default")
    assert (place.mesh, place.store) == ("trips", "")
    assert place.why == "stack 'default' runs mesh 'flights', not 'trips'"


def test_a_wrong_mesh_file_is_one_line_that_names_the_place(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mesh_at(tmp_path / "wrong", ("\nversion = 1\n", "\nversion = 7\n"))
    with pytest.raises(typer.Exit):
        place_of(file, "default")
    assert capsys.readouterr().err.startswith(f"tenfold: {file}:")


def test_a_mesh_file_may_describe_features_alone(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenfold.toml"
    file.write_text('version = 1\nname = "rides"\n\n[features]\ndefinitions = "views.py"\noffline = "events"\n')
    place = place_of(None, "default")
    assert (place.mesh, place.definitions) == ("rides", str(tmp_path / "views.py"))
    assert place.offline == str(home / "events")


def test_what_a_file_of_features_alone_may_not_hold_is_told_with_its_line(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tenfold.toml"
    file.write_text('version = 1\nname = "rides"\n\n[features]\ndefinition = "views.py"\n')
    with pytest.raises(typer.Exit):
        place_of(None, "default")
    assert capsys.readouterr().err.startswith(f"tenfold: {file}:4: features: ")
