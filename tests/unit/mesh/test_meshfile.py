from __future__ import annotations

from pathlib import Path

import pytest

from services.mesh.meshfile import MeshFileError, Service, line_of, load, parse
from services.resilience.call import Priority

FLIGHTS = Path(__file__).parents[3] / "deploy" / "flights" / "tenfold.toml"

SMALL = """\
version = 1
name = "small"

[[services]]
name = "router"
replicas = 2

[[priorities]]
name = "critical"
slo_p99_ms = 250
max_in_flight = 8

[[priorities]]
name = "standard"
slo_p99_ms = 500
max_in_flight = 4

[[priorities]]
name = "background"
slo_p99_ms = 2000
max_in_flight = 2

[[models]]
name = "delay"
output = "late"
required_quality = { critical = 0.7, standard = 0.6, background = 0.5 }

[[models.tiers]]
name = "tiny"
model = "delay_tiny"
quality = 0.6
usd_per_1000 = 0.1
expected_ms = 5

[[models.tiers]]
name = "full"
model = "delay_full"
quality = 0.7
usd_per_1000 = 1.0
expected_ms = 10

[[models.fallbacks]]
kind = "prior"
path = "prior.json"
"""


def test_the_file_of_the_demonstration_is_good() -> None:
    mesh = load(FLIGHTS)
    model = mesh.model("flight_delay")
    assert model is not None
    assert [tier.name for tier in model.tiers] == ["linear", "small", "full"]


def test_a_file_is_read_as_it_says() -> None:
    mesh = parse(SMALL)
    assert mesh.service("router").replicas == 2
    assert mesh.service("feature") == Service("feature")
    assert mesh.priority(Priority.STANDARD).max_in_flight == 4
    assert mesh.gateway.retries.attempts == 2
    model = mesh.model("delay")
    assert model is not None
    assert model.required_quality.of(Priority.CRITICAL) == 0.7
    assert mesh.model("other") is None


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed('name = "small"', 'name = "Small"'), "tenfold.toml:2: name: "),
        (changed("version = 1", "version = 2"), "tenfold.toml:1: version: "),
        (changed("replicas = 2", "replicas = 0"), r"tenfold.toml:6: services\[0\].replicas: "),
        (changed("replicas = 2", "replica = 2"), r"tenfold.toml:4: services\[0\]: .*replica"),
        (
            changed('name = "router"', 'name = "cache"'),
            r"tenfold.toml:5: services\[0\].name: must be one of .*got 'cache'",
        ),
        (
            changed("replicas = 2", 'transport = "quic"'),
            r"tenfold.toml:6: services\[0\].transport: must be grpcio or native",
        ),
        (changed("expected_ms = 10", "expected_ms = 0"), r"tenfold.toml:40: models\[0\].tiers\[1\].expected_ms: "),
        (
            changed("usd_per_1000 = 0.1", 'usd_per_1000 = "cheap"'),
            r"tenfold.toml:32: models\[0\].tiers\[0\].usd_per_1000: ",
        ),
        (
            changed('name = "full"', 'name = "tiny"'),
            r"tenfold.toml:36: models\[0\].tiers\[1\].name: 'tiny' is there twice",
        ),
        (
            changed("critical = 0.7", "critical = 0.9"),
            r"tenfold.toml:26: models\[0\].required_quality.critical: no tier is that good: 0.9 is above .* 0.7",
        ),
        (
            changed('kind = "prior"', 'kind = "guess"'),
            r"tenfold.toml:43: models\[0\].fallbacks\[0\].kind: must be last_good, onnx or prior, got 'guess'",
        ),
        (
            changed('kind = "prior"', 'kind = "last_good"'),
            r"tenfold.toml:42: models\[0\].fallbacks\[0\].entity: must name the entity",
        ),
        (
            changed('path = "prior.json"', ""),
            r"tenfold.toml:42: models\[0\].fallbacks\[0\].path: must name the file",
        ),
        (
            changed('name = "background"', 'name = "bulk"'),
            r"tenfold.toml:19: priorities\[2\].name: must be one of .*got 'bulk'",
        ),
        (
            changed('[[priorities]]\nname = "background"\nslo_p99_ms = 2000\nmax_in_flight = 2\n', ""),
            "background missing",
        ),
        (changed("replicas = 2", "replicas ="), "tenfold.toml:6: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(MeshFileError, match=message):
        parse(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MeshFileError, match=r"missing\.toml: No such file"):
        load(tmp_path / "missing.toml")


def test_the_line_of_a_value_that_is_left_out_is_that_of_its_table() -> None:
    assert line_of(SMALL, "models[0].tiers[1].version") == SMALL[: SMALL.index('name = "full"')].count("\n")
    assert line_of(SMALL, "nothing.like.it") == 1


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_bytes(b"version = 1\n\xff")
    with pytest.raises(MeshFileError, match=r"mesh\.toml: must be UTF-8, got byte 0xff"):
        load(file)
