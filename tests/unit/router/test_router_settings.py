from __future__ import annotations

import pytest

from services.mesh.settings import SettingsError, from_env
from services.router.settings import RouterSettings

ENVIRON = {
    "TENFOLD_MESH_FILE": "tenfold.toml",
    "TENFOLD_LISTEN": "unix:/tmp/router",
    "TENFOLD_INSTANCE": "router-0",
    "TENFOLD_EGRESS": "unix:/tmp/egress",
}


def test_the_environment_sets_every_knob() -> None:
    settings = from_env(RouterSettings, ENVIRON | {"TENFOLD_IN_FLIGHT": "3", "TENFOLD_SLOW_S": "0.25"})
    assert (settings.limits.max_in_flight, settings.breaker.slow_s) == (3, 0.25)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("TENFOLD_EGRESS", "", "TENFOLD_EGRESS must be the address"),
        ("TENFOLD_MAX_BATCH", "0", "TENFOLD_MAX_BATCH must be at least 1, got 0"),
        ("TENFOLD_IN_FLIGHT", "two", "TENFOLD_IN_FLIGHT must be int, got 'two'"),
        ("TENFOLD_CALLEE_TIMEOUT_S", "0", "TENFOLD_CALLEE_TIMEOUT_S must be above 0 s, got 0.0"),
        ("TENFOLD_SHADOW_EVERY", "-1", "TENFOLD_SHADOW_EVERY must be at least 0, got -1"),
        ("TENFOLD_TRANSPORT", "http", "TENFOLD_TRANSPORT must be grpcio or native, got 'http'"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(name: str, value: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        from_env(RouterSettings, ENVIRON | {name: value})
