from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.mesh.settings import ServiceSettings, SettingsError, from_env

NEEDED = {"TENFOLD_MESH_FILE": "mesh.toml", "TENFOLD_LISTEN": "unix:/x", "TENFOLD_INSTANCE": "router-0"}


@dataclasses.dataclass(frozen=True, slots=True)
class Knobs:
    count: int
    ratio: float = 0.5
    name: str = "x"
    folder: Path = Path("/tmp")
    on: bool = False


def test_every_type_is_read() -> None:
    environ = {
        "TENFOLD_COUNT": "3",
        "TENFOLD_RATIO": "0.25",
        "TENFOLD_NAME": "y",
        "TENFOLD_FOLDER": "/a/b",
        "TENFOLD_ON": " Yes ",
        "OTHER": "ignored",
    }
    assert from_env(Knobs, environ) == Knobs(3, 0.25, "y", Path("/a/b"), on=True)


def test_what_is_not_set_keeps_its_default() -> None:
    settings = from_env(ServiceSettings, NEEDED)
    assert settings == ServiceSettings(Path("mesh.toml"), "unix:/x", "router-0")
    assert (settings.transport, settings.channel, settings.egress) == ("grpcio", "h2", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TENFOLD_COUNT": "three"}, "TENFOLD_COUNT must be int, got 'three'"),
        ({"TENFOLD_COUNT": "1", "TENFOLD_RATIO": "half"}, "TENFOLD_RATIO must be float, got 'half'"),
        (
            {"TENFOLD_COUNT": "1", "TENFOLD_ON": "maybe"},
            "TENFOLD_ON must be one of 1, true, yes, on, 0, false, no, off",
        ),
        ({}, "TENFOLD_COUNT must be set"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_env(Knobs, changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TENFOLD_TRANSPORT", "quic", "TENFOLD_TRANSPORT must be grpcio or native, got 'quic'"),
        ("TENFOLD_CHANNEL", "quic", "TENFOLD_CHANNEL must be h2 or grpcio, got 'quic'"),
        ("TENFOLD_GRACE_S", "-1", r"TENFOLD_GRACE_S must be at least 0 s, got -1\.0"),
        ("TENFOLD_LAME_DUCK_S", "nan", "TENFOLD_LAME_DUCK_S must be at least 0 s, got nan"),
    ],
)
def test_a_service_refuses_settings_it_cannot_run_with(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_env(ServiceSettings, NEEDED | {name: value})
