import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_constraints_are_made_from_what_builds_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "deploy" / "build-requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["build-system"]["requires"]


def test_constraints_pin_names_and_versions_and_no_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.\-]+==[0-9][a-z0-9.+]*", line)] == []
