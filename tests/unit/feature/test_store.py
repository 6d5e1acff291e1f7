from __future__ import annotations

import numpy as np
import pytest

from services.feature.define.schema import ViewSchema
from services.feature.online.store import PublishedView, expiries_ms
from services.feature.online.valkey import Address
from services.feature.registry import MIN_BETWEEN_S, Registry
from services.feature.service import read_request
from services.feature.settings import FeatureSettings
from services.mesh.settings import SettingsError, from_env
from services.resilience.errors import BadInput, NotFound, Unavailable
from tenfold.feature.v1 import feature_pb2 as pb

NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000


def published(name: str, rows: int = 1, columns: tuple[str, ...] = ("a", "b")) -> PublishedView:
    schema = ViewSchema(name, "entity", columns)
    return PublishedView(name, "entity", list(columns), 0.0, f"{schema.schema_hash:016x}", NOW_US, rows)


class FakeStore:
    """Holds views, counts how often they are read, and may be down."""

    def __init__(self, *views: PublishedView) -> None:
        self.views = list(views)
        self.reads = 0
        self.down = False

    async def read(self) -> list[PublishedView]:
        self.reads += 1
        if self.down:
            raise Unavailable("down")
        return self.views


class Ticks:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Ticks:
    return Ticks()


def registry_of(store: FakeStore, clock: Ticks) -> Registry:
    return Registry(store.read, lambda view, generation: f"tf:test:{generation or view}:{{", clock)


async def test_views_are_read_at_most_once_a_second_however_often_they_are_asked_for(clock: Ticks) -> None:
    store = FakeStore(published("route"))
    registry = registry_of(store, clock)
    for _ in range(5):
        await registry.refresh()
    assert store.reads == 1
    clock.now = MIN_BETWEEN_S
    await registry.refresh()
    assert store.reads == 2


async def test_an_unknown_view_is_told_together_with_the_known_ones(clock: Ticks) -> None:
    registry = registry_of(FakeStore(published("route"), published("dest")), clock)
    await registry.refresh()
    with pytest.raises(NotFound, match="view 'rout' is not published; published are: dest, route"):
        registry.find(["route", "rout"])


async def test_a_view_that_did_not_change_keeps_its_plan(clock: Ticks) -> None:
    store = FakeStore(published("dest"), published("route"))
    registry = registry_of(store, clock)
    await registry.refresh()
    dest, route = registry.find(["dest", "route"])
    store.views = [published("dest"), published("route", columns=("a", "b", "c"))]
    clock.now = MIN_BETWEEN_S
    await registry.refresh()
    assert registry.find(["dest"])[0] is dest
    assert registry.find(["route"])[0].layout.schema.schema_hash != route.layout.schema.schema_hash


async def test_what_is_known_survives_a_store_that_is_down_or_came_back_empty(clock: Ticks) -> None:
    store = FakeStore(published("route"))
    registry = registry_of(store, clock)
    await registry.refresh()
    store.down, clock.now = True, MIN_BETWEEN_S
    with pytest.raises(Unavailable):
        await registry.refresh()
    with pytest.raises(Unavailable):  # the same failure, told again without another read
        await registry.refresh()
    assert store.reads == 2
    store.down, store.views, clock.now = False, [], 2 * MIN_BETWEEN_S
    await registry.refresh()
    assert [plan.view.name for plan in registry.find(["route"])] == ["route"]


async def test_a_view_that_is_withdrawn_while_others_stay_is_forgotten(clock: Ticks) -> None:
    store = FakeStore(published("dest"), published("route"))
    registry = registry_of(store, clock)
    await registry.refresh()
    store.views, clock.now = [published("dest")], MIN_BETWEEN_S
    await registry.refresh()
    with pytest.raises(NotFound, match="published are: dest"):
        registry.find(["route"])


def test_rows_leave_the_store_a_while_after_they_expired_but_replayed_ones_stay() -> None:
    events = np.array([NOW_US, NOW_US - 59_000_000, NOW_US - 60_000_000, NOW_US - 10 * 365 * 24 * HOUR_US])
    leaves_ms = (NOW_US + 60_000_000 + HOUR_US) // 1000  # a minute of life, an hour of telling that it ended
    assert expiries_ms(60.0, events, NOW_US, 4) == [leaves_ms, leaves_ms - 59_000, 0, 0]
    assert expiries_ms(0.0, events, NOW_US, 4) == [0, 0, 0, 0]
    assert expiries_ms(86400.0, NOW_US, NOW_US, 2) == [(NOW_US + 48 * HOUR_US) // 1000] * 2


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:///tmp/v.sock", Address(path="/tmp/v.sock")),
        ("unix:///tmp/v.sock?db=3", Address(path="/tmp/v.sock", database=3)),
        ("redis://store", Address(host="store")),
        ("redis://:s%40cret@store:7000/2", Address(host="store", port=7000, database=2, password="s@cret")),
        ("redis://me:secret@store", Address(host="store", username="me", password="secret")),
        ("rediss://store:7001?ca=/c.pem", Address(host="store", port=7001, tls=True, ca="/c.pem")),
    ],
)
def test_a_store_is_named_by_url(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize(
    "url", ["", "store:6379", "http://store", "unix:", "redis://store/one", "redis://store:port", "unix:///v?db=-1"]
)
def test_a_url_that_names_no_store_is_refused_with_what_is_allowed(url: str) -> None:
    with pytest.raises(ValueError, match="must be unix:///path"):
        Address.parse(url)


def test_the_greeting_of_a_connection_carries_password_and_database() -> None:
    assert Address.parse("redis://me:secret@store/2").greeting() == [("AUTH", "me", "secret"), ("SELECT", 2), ("PING",)]
    assert Address.parse("unix:///v").greeting() == [("PING",)]


def ask(*views: pb.ViewKeys) -> pb.GetFeaturesRequest:
    return pb.GetFeaturesRequest(views=views)


BAD_REQUESTS = {
    "no views": (ask(), "views", "must hold 1 to 256 views, got 0"),
    "too many views": (
        ask(*[pb.ViewKeys(view="route", entity_ids=["a"])] * 257),
        "views",
        "must hold 1 to 256 views, got 257",
    ),
    "no view name": (ask(pb.ViewKeys(entity_ids=["a"])), "views[0].view", "must name a view, got ''"),
    "no ids": (ask(pb.ViewKeys(view="route")), "views[0].entity_ids", "must hold at least 1 id, got 0"),
    "an empty id": (
        ask(pb.ViewKeys(view="route", entity_ids=["a", ""])),
        "views[0].entity_ids[1]",
        "must have 1 to 256 bytes of UTF-8, got 0 bytes: ''",
    ),
    "a long id": (
        ask(pb.ViewKeys(view="route", entity_ids=["x" * 257])),
        "views[0].entity_ids[0]",
        f"must have 1 to 256 bytes of UTF-8, got 257 bytes: {'x' * 40!r}",
    ),
    "a long id of few characters": (
        ask(pb.ViewKeys(view="route", entity_ids=["ü" * 129])),
        "views[0].entity_ids[0]",
        f"must have 1 to 256 bytes of UTF-8, got 258 bytes: {'ü' * 40!r}",
    ),
    "one time for two ids": (
        ask(pb.ViewKeys(view="route", entity_ids=["a", "b"], as_of_us=[NOW_US])),
        "views[0].as_of_us",
        "must be empty or hold one time per entity id, 2, got 1",
    ),
    "a time of zero": (
        ask(pb.ViewKeys(view="route", entity_ids=["a", "b"], as_of_us=[NOW_US, 0])),
        "views[0].as_of_us[1]",
        "must be microseconds since 1970, at least 1, got 0",
    ),
    "too many rows": (
        ask(*[pb.ViewKeys(view="route", entity_ids=["a"] * 4)] * 3),
        "views",
        "must ask for at most 10 rows in all, got 12",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_input_is_named_with_its_value_and_what_is_allowed(case: str) -> None:
    request, field, description = BAD_REQUESTS[case]
    with pytest.raises(BadInput) as caught:
        read_request(request, max_rows=300 if case == "too many views" else 10)
    assert [(v.field, v.description) for v in caught.value.violations] == [(field, description)]


def test_every_wrong_field_is_named_up_to_a_few() -> None:
    with pytest.raises(BadInput) as caught:
        read_request(ask(pb.ViewKeys(view="", entity_ids=[""] * 100)), max_rows=1000)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["views[0].view", *(f"views[0].entity_ids[{j}]" for j in range(7))]


def test_an_id_of_256_bytes_is_allowed() -> None:
    wanted = read_request(ask(pb.ViewKeys(view="route", entity_ids=["ü" * 128])), max_rows=1)
    assert wanted == [("route", ["ü" * 128], [])]


ENVIRON = {
    "TENFOLD_MESH_FILE": "tenfold.toml",
    "TENFOLD_LISTEN": "unix:/tmp/f",
    "TENFOLD_INSTANCE": "feature-0",
    "TENFOLD_STORE": "unix:///tmp/v.sock",
}


def test_settings_come_from_the_environment() -> None:
    settings = from_env(FeatureSettings, {**ENVIRON, "TENFOLD_MAX_ROWS": "7"})
    assert (settings.store, settings.max_rows, settings.instance) == ("unix:///tmp/v.sock", 7, "feature-0")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TENFOLD_STORE", "http://store", "TENFOLD_STORE: the store's URL must be unix"),
        ("TENFOLD_STORE_TIMEOUT_S", "0", "TENFOLD_STORE_TIMEOUT_S must be above 0 s, got 0.0"),
        ("TENFOLD_REFRESH_S", "nan", "TENFOLD_REFRESH_S must be above 0 s, got nan"),
        ("TENFOLD_MAX_ROWS", "0", "TENFOLD_MAX_ROWS must be at least 1, got 0"),
        ("TENFOLD_MAX_BATCH", "0", "max_batch must be at least 1, got 0"),
        ("TENFOLD_TRANSPORT", "carrier pigeon", "TENFOLD_TRANSPORT must be grpcio or native"),
    ],
)
def test_settings_that_cannot_be_used_are_named(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        from_env(FeatureSettings, {**ENVIRON, name: value})
