"""What can be set of streams."""

from __future__ import annotations

import pytest

from services.feature.settings import FeatureSettings
from services.mesh.settings import SettingsError, from_env

ENVIRON = {
    "TENFOLD_MESH_FILE": "tenfold.toml",
    "TENFOLD_LISTEN": "unix:/tmp/f.sock",
    "TENFOLD_INSTANCE": "feature-0",
    "TENFOLD_STORE": "unix:///tmp/v.sock",
}


def test_events_must_be_durable_and_are_applied_unless_said_otherwise() -> None:
    settings = from_env(FeatureSettings, ENVIRON)
    assert (settings.events_durability, settings.apply, settings.replay, settings.archive) == ("disk", True, False, "")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("EVENTS_DURABILITY", "none", "TENFOLD_EVENTS_DURABILITY must be disk or memory, got 'none'"),
        ("MAX_LOG_EVENTS", "0", "TENFOLD_MAX_LOG_EVENTS must be at least 1, got 0"),
        ("MAX_EVENTS", "-1", "TENFOLD_MAX_EVENTS must be at least 1, got -1"),
        ("ARCHIVE_LEAST", "0", "TENFOLD_ARCHIVE_LEAST must be at least 1, got 0"),
        ("MAX_AHEAD_S", "-1", "TENFOLD_MAX_AHEAD_S must be 0 to 86400 s, got -1"),
        ("MAX_AHEAD_S", "nan", "TENFOLD_MAX_AHEAD_S must be 0 to 86400 s, got nan"),
        ("LEASE_S", "0", "TENFOLD_LEASE_S must be above 0 s, got 0"),
        ("EVENTS_TIMEOUT_S", "0", "TENFOLD_EVENTS_TIMEOUT_S must be above 0 s, got 0"),
        ("ARCHIVE_S", "-3", "TENFOLD_ARCHIVE_S must be above 0 s, got -3"),
        ("APPLY", "perhaps", "TENFOLD_APPLY must be one of"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError) as raised:
        from_env(FeatureSettings, {**ENVIRON, f"TENFOLD_{name}": value})
    assert told in str(raised.value)
