import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.local.commands import DEMONSTRATION


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def test_help_waits_for_nothing_that_it_does_not_need() -> None:
    heavy = "{'grpc', 'numpy', 'duckdb', 'rich', 'msgspec', 'psutil', 'opentelemetry', 'supervisor'}"
    code = f"import sys, deploy.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_command_is_there() -> None:
    status, told = run("--help")
    assert status == 0
    for command in ("up", "down", "status", "logs", "predict", "traces", "features", "demo", "prepare", "validate"):
        assert f"\n  {command} " in told


def test_a_valid_mesh_file_is_told_to_be_valid() -> None:
    status, told = run("validate", str(DEMONSTRATION))
    assert (status, "mesh 'flights' is valid" in told) == (0, True)


def test_a_wrong_mesh_file_is_one_clear_line_that_names_the_place(tmp_path: Path) -> None:
    file = tmp_path / "tenfold.toml"
    file.write_text(DEMONSTRATION.read_text().replace("max_missing = 0.5", "max_missing = 5"))
    line = file.read_text().splitlines().index("max_missing = 5") + 1
    status, told = run("validate", str(file))
    assert status == 1
    assert told.startswith(f"tenfold: {file}:{line}: models[0].max_missing: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "predict --flight UA1216"])
def test_a_stack_that_does_not_run_is_told_by_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    monkeypatch.delenv("TENFOLD_RUN", raising=False)
    status, told = run(*command.split(), "--stack", "mine")
    assert status == 1
    assert told.startswith("tenfold: no stack 'mine' is running here")


def test_down_of_a_stack_that_does_not_run_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    assert run("down") == (0, "no stack 'default' is running\n")


def test_a_stack_s_name_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    status, told = run("down", "--stack", "../etc")
    assert status == 1
    assert "a stack's name must be" in told


def test_traces_of_a_stack_that_kept_none_are_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    status, told = run("traces", "list")
    assert status == 1
    assert "no traces have been kept here" in told


def test_traces_in_a_file_that_is_no_database_are_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    monkeypatch.delenv("TENFOLD_RUN", raising=False)
    file = tmp_path / "run" / "default" / "traces.db"
    file.parent.mkdir(parents=True)
    file.write_text("no database, but long enough to be looked at " * 100)
    for command in ("list", "show"):
        assert run("traces", command) == (1, f"tenfold: {file}: file is not a database\n")


def test_a_timeout_that_never_ends_is_refused() -> None:
    status, told = run("predict", "--flight", "UA1216", "--timeout-ms", "inf")
    assert status == 2
    assert "must be finite" in told


def test_what_every_command_does_is_told_in_full() -> None:
    commands = run("--help")[1].partition("Commands:")[2]
    assert "..." not in commands
