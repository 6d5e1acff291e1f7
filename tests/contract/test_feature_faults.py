"""What can go wrong, and the status that each fault has: for rows that are stored and for states that are finished.

Here is what the tests of the parts do not show; theirs are test_feature_service.py, _store.py, _generations.py,
_stream.py, _log.py, _archive.py and _crash.py.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import grpc
import numpy as np
import pytest

from services.feature.define.definition import Aggregate, RequestView, Value, View, latest, quantile, top_k, windowed
from services.feature.define.definitions import Definitions
from services.feature.define.schema import ViewSchema
from services.feature.online.packed import MISSING, OK
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.stream.applier import Gap, Target
from services.feature.stream.archive import ArchiveError
from services.feature.stream.rebuild import Builder
from services.feature.stream.states import StateStore, numbered
from services.feature.tiles.plan import compiled
from services.resilience.errors import BadInput, Refused
from tenfold.feature.v1 import feature_pb2 as pb
from tests.conftest import ValkeyProcess
from tests.contract.streamed import (
    HOUR_US,
    LONG_S,
    MESH,
    NOW_US,
    ORDERS,
    Serving,
    build,
    builder,
    eventually,
    order,
    request,
    serving,
)

PRICE = ViewSchema("price", "shop", ("low", "high"))
SHOP = View(
    "shop",
    "shop",
    (
        *windowed(ORDERS, "", (Aggregate.COUNT,), ("1h", "")),
        *windowed(ORDERS, "kind", (Aggregate.DISTINCT,), ("1h",)),
        quantile(ORDERS, "amount", 0.5, "1h"),
        top_k(ORDERS, "kind", 2),
        *latest(ORDERS, "amount"),
    ),
    stream=True,
)
LEVEL = RequestView("level", inputs=("offer",), features=(Value("over", "input.offer - shop.amount_last"),))
FREE = RequestView("free", inputs=("offer",), features=(Value("double", "input.offer * 2"),))
DEFINITIONS = Definitions((SHOP,), (LEVEL, FREE))
LAST = SHOP.columns.index("amount_last")
AS_OF_US = NOW_US + 60_000_000


@dataclass
class Place:
    """A served store with a view of rows and one of states, each with the entities "a" and "b"."""

    served: Serving
    store: OnlineStore
    client: Valkey
    builder: Builder
    prefixes: dict[str, str]

    async def values(self, view: str, *ids: str, as_of_us: int = AS_OF_US) -> list[float | None]:
        """What tells one entity from another in that view; None where it is missing."""
        rows = await self.served.rows(view, ids, as_of_us)
        at = LAST if view == "shop" else 0
        matrix = np.frombuffer(rows.values, "<f4").reshape(len(ids), -1)[:, at]
        status = np.frombuffer(rows.status, np.uint8).reshape(len(ids), -1)[:, at]
        assert set(status.tolist()) <= {OK, MISSING}
        return [float(value) if one == OK else None for value, one in zip(matrix, status, strict=True)]

    async def put(self, view: str, ids: list[str], amounts: list[float], sequence: int) -> None:
        """Gives entities their values, in a new generation of rows, or by events."""
        if view == "price":
            values = np.array([[amount, 0.0] for amount in amounts])
            await publish(self.store, ids, values)
            await eventually(lambda: self.reads(view, ids, amounts))
            return
        events = [order(sequence + i, one, amounts[i], NOW_US + sequence + i, kind="x") for i, one in enumerate(ids)]
        await self.served.write(request(*events))
        await self.served.caught_up()

    async def reads(self, view: str, ids: list[str], amounts: list[float]) -> bool:
        return await self.values(view, *ids) == amounts


async def publish(store: OnlineStore, ids: list[str], values: np.ndarray, schema: ViewSchema = PRICE) -> int:
    generation = await store.begin(schema)
    await store.load(schema, generation, ids, NOW_US, values)
    await store.publish([schema], NOW_US, {schema.name: len(ids)}, {schema.name: generation})
    return generation


@pytest.fixture
async def place(durable_valkey: ValkeyProcess, folder: Path) -> AsyncIterator[Place]:
    url = durable_valkey.url
    states = (await build(url, folder, [SHOP]))["shop"].generation
    async with Valkey(url) as client, builder(url, folder) as building:
        await client.connected(LONG_S)
        store = OnlineStore(ValkeyTable(client), MESH)
        rows = await publish(store, ["a", "b"], np.array([[1.0, 0.0], [2.0, 0.0]]))
        async with serving(url, definitions=DEFINITIONS) as served:
            prefixes = {"price": store.key_prefix("price", rows), "shop": store.key_prefix("shop", states)}
            found = Place(served, store, client, building, prefixes)
            await found.put("shop", ["a", "b"], [1.0, 2.0], 1)
            yield found


def signed(body: bytes) -> bytes:
    """As if whoever wrote it had meant it."""
    return body + struct.pack("<I", crc32(body))


def with_word(at: int, word: int) -> Callable[[bytes], bytes]:
    return lambda state: signed(state[:at] + struct.pack("<q", word) + state[at + 8 : -4])


PLAN = compiled(SHOP)
TILES_AT = 12 + 8 * (2 + len(PLAN.sources) + len(PLAN.runs) + len(PLAN.recents) + len(PLAN.sketches))
SIZE_AT = {
    sketch.aggregate: TILES_AT + 8 * (run.number * PLAN.tile_words + sketch.column)
    for run in PLAN.runs
    for sketch in run.sketches
}
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    f"{what} {view}": (view, damage)
    for view in ("price", "shop")
    for what, damage in {
        "an empty": lambda _: b"",
        "a cut": lambda blob: blob[:-1],
        "an overlong": lambda blob: blob + b"\0",
        "a flipped": lambda blob: blob[:21] + bytes([blob[21] ^ 1]) + blob[22:],
        "a foreign": lambda blob: signed(blob[:4] + b"\1" * 8 + blob[12:-4]),
        "an unknown version of a": lambda blob: signed(blob[:3] + b"\x7f" + blob[4:-4]),
        "a huge": lambda _: bytes(2**20),
    }.items()
}
# with checksums that hold
DAMAGES |= {f"{aggregate} of a wrong size": ("shop", with_word(at, 7)) for aggregate, at in SIZE_AT.items()}
DAMAGES |= {f"{aggregate} of no size": ("shop", with_word(at, -1)) for aggregate, at in SIZE_AT.items()}
DAMAGES |= {
    f"a tile of {us}": ("shop", with_word(TILES_AT, us)) for us in (2**62, -(2**62), 2**36, -(2**63), 2**63 - 1)
}


@pytest.mark.parametrize("case", DAMAGES)
async def test_a_blob_that_is_not_what_was_written_is_missing_and_hurts_no_other(place: Place, case: str) -> None:
    view, damage = DAMAGES[case]
    key = place.prefixes[view] + "a}"
    blob = await place.client.call("GET", key, timeout_s=LONG_S)
    await place.client.call("SET", key, damage(blob), timeout_s=LONG_S)
    assert await place.values(view, "b", "a", "nobody", "b") == [2.0, None, None, 2.0]
    await place.put("shop", ["a", "b"], [7.0, 8.0], 10)  # events of both, in one batch
    expected = [8.0, None, None, 8.0] if view == "shop" else [2.0, None, None, 2.0]
    assert await place.values(view, "b", "a", "nobody", "b") == expected


@pytest.mark.parametrize("view", ["price", "shop"])
async def test_a_key_that_holds_something_else_altogether_is_missing(place: Place, view: str) -> None:
    key = place.prefixes[view] + "a}"
    await place.client.call("DEL", key, timeout_s=LONG_S)
    await place.client.call("LPUSH", key, "x", timeout_s=LONG_S)
    assert await place.values(view, "a", "b") == [None, 2.0]


ODD_IDS = [
    "}",
    "{",
    "{}",
    "a}b",
    "a}",
    "{a}",
    "a}{a",
    "*",
    "[ab]",
    "a?",
    "\\",
    "a\nb",
    "a\r\n",
    "a\0b",
    "\0",
    " ",
    "a ",
]
ODD_IDS += [
    "caf\u00e9",
    "cafe\u0301",
    "\U0001f600" * 64,
    "x" * 256,
    "log:orders",
    ":{a",
    "1{a",
    "views",
    "%s",
    "\u202e",
]


@pytest.mark.parametrize("view", ["price", "shop"])
async def test_whatever_an_id_looks_like_it_is_one_entity_and_no_other(place: Place, view: str) -> None:
    ids = [*ODD_IDS, "a", "b"]
    amounts = [float(100 + i) for i in range(len(ids))]
    await place.put(view, ids, amounts, 100)
    assert await place.values(view, *ids) == amounts
    assert await place.values(view, "A", "caf", "x" * 255, "{b}", "nobody") == [None] * 5


async def test_removing_one_generation_takes_every_odd_id_of_it_and_nothing_else(place: Place) -> None:
    first = await publish(place.store, ODD_IDS, np.ones((len(ODD_IDS), 2)))
    await place.put("price", ODD_IDS, [2.0] * len(ODD_IDS), 0)
    assert await place.store.retire("price", first, 0.0) == len(ODD_IDS)
    assert await place.values("price", *ODD_IDS) == [2.0] * len(ODD_IDS)
    assert await place.values("shop", "a", "b") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ({"view": "level", "rows": 1, "twice": True}, "INVALID_ARGUMENT", "must hold 'shop' once"),
        ({"view": "free", "rows": 4097}, "INVALID_ARGUMENT", "must be of at most 4096 rows, got 4097"),
        ({"view": "free", "rows": 1, "times": 257}, "INVALID_ARGUMENT", "must hold at most 256 views, got 257"),
        ({"view": "free", "rows": 4096, "times": 256}, "INVALID_ARGUMENT", "bytes of rows in all"),
        ({"view": "free", "rows": 0}, "OK", ""),
        ({"view": "free", "rows": 3}, "OK", ""),
        ({"view": "level", "rows": 1}, "OK", ""),
        ({"view": "level", "rows": 2}, "INVALID_ARGUMENT", "must hold 1 numbers, got 2"),
    ],
)
async def test_a_request_view_is_of_as_many_rows_as_may_be_or_refused(
    place: Place, asked: dict[str, int], status: str, told: str
) -> None:
    inputs = {"offer": pb.InputNumbers(values=[5.0] * asked["rows"])}
    wanted = [pb.RequestViewInputs(view=str(asked["view"]), inputs=inputs)] * asked.get("times", 1)
    views = [pb.ViewKeys(view="shop", entity_ids=["b"])] * (2 if asked.get("twice") else 1)
    call = place.served.stub.GetFeatures(pb.GetFeaturesRequest(views=views, request_views=wanted), timeout=LONG_S)
    if status == "OK":
        rows = (await call).views[1]
        expected = [10.0] * asked["rows"] if asked["view"] == "free" else [3.0]
        assert np.frombuffer(rows.values, "<f4").tolist() == expected
        return
    with pytest.raises(grpc.aio.AioRpcError, match=told) as raised:
        await call
    assert raised.value.code().name == status


@pytest.mark.parametrize("as_of_us", [1, NOW_US - HOUR_US, NOW_US + 24 * HOUR_US, 2**53, 2**63 - 1])
@pytest.mark.parametrize("view", ["price", "shop"])
async def test_whatever_the_clock_says_an_age_says_how_far_it_is_from_the_events(
    place: Place, view: str, as_of_us: int
) -> None:
    rows = await place.served.rows(view, ["a"] * 30, as_of_us)
    known_us = np.frombuffer(rows.event_us, "<i8")[0]
    if view == "shop" and as_of_us < NOW_US:
        assert (set(rows.status), known_us) == ({MISSING}, 0)  # nothing was known yet
        return
    assert known_us >= NOW_US
    ages = np.frombuffer(rows.age_s, "<f4")
    np.testing.assert_allclose(ages, (as_of_us - int(known_us)) / 1e6, rtol=1e-6)


async def test_a_view_of_another_definition_is_not_found_and_told_as_such(place: Place) -> None:
    wider = replace(SHOP, features=(*SHOP.features, *windowed(ORDERS, "", (Aggregate.COUNT,), ("24h",))))
    await place.builder.build(wider)

    await eventually(lambda: told_of_another(place, True))
    await place.builder.build(SHOP)
    await eventually(lambda: told_of_another(place, False))


async def told_of_another(place: Place, wanted: bool) -> bool:
    """Whether it is told, or is not, that the definition is another; meanwhile values are right."""
    try:
        values = await place.values("shop", "a", "b")
    except grpc.aio.AioRpcError as error:
        status, told = error.code().name, str(error.details())
        expected = status == "NOT_FOUND" and "published with another definition than this server has" in told
        if not expected:
            raise
        return wanted
    return values == [1.0, 2.0] and not wanted


async def test_rows_are_not_written_over_states(place: Place) -> None:
    with pytest.raises(BadInput, match="'shop' is maintained by stream"):
        await place.store.write(SHOP.schema(), ["a"], NOW_US + HOUR_US, np.ones((1, len(SHOP.columns))))
    with pytest.raises(BadInput, match="'shop' is maintained by stream"):
        await place.store.publish([SHOP.schema()], NOW_US, {"shop": 1})
    assert await place.values("shop", "a", "b") == [1.0, 2.0]


@pytest.mark.parametrize("view", ["price", "shop"])
async def test_while_generations_follow_one_another_every_answer_is_whole(place: Place, view: str) -> None:
    stop, answers = asyncio.Event(), 0

    async def keep_reading() -> None:
        nonlocal answers
        while not stop.is_set():
            found = await place.values(view, "a", "b")
            assert found[0] == 1.0 if view == "shop" else found[1] is not None
            assert found[1] == (2 * found[0] if found[0] is not None else None)
            answers += 1

    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(keep_reading()) for _ in range(4)]
        for turn in range(8):
            if view == "shop":
                await place.builder.build(SHOP)
            else:
                await publish(place.store, ["a", "b"], np.array([[turn + 1.0, 0.0], [2.0 * turn + 2.0, 0.0]]))
            await asyncio.sleep(0.05)
        stop.set()
    assert len(readers) == 4
    assert answers > 8


async def test_of_two_builds_at_once_the_one_begun_later_is_read_and_kept_up_to_date(
    place: Place, durable_valkey: ValkeyProcess, folder: Path
) -> None:
    async with builder(durable_valkey.url, folder) as other:
        begun, go_on = asyncio.Event(), asyncio.Event()

        class Slow(Builder):
            async def _catch_up(self, target: Target, progress: Callable[[str, float], None]) -> None:
                await Builder._catch_up(self, target, progress)
                begun.set()
                await go_on.wait()

        slow = Slow(other.folder, other.archive, other.store, other.table, other.states)
        earlier = asyncio.create_task(slow.build(SHOP))
        await begun.wait()
        later = await place.builder.build(SHOP)
        go_on.set()
        built = await earlier
    assert (built.generation < later.generation, built.overtaken, later.overtaken) == (True, True, False)
    names = await StateStore(place.client, MESH).built(LONG_S)
    assert list(names) == [numbered("shop", later.generation)]
    await place.put("shop", ["a"], [9.0], 50)
    await eventually(lambda: place.reads("shop", ["a", "b"], [9.0, 2.0]))


async def fill_up(client: Valkey, room: int = 0) -> None:
    """The store takes nothing more, or not more than some bytes."""
    used = int((await client.call("INFO", "memory", timeout_s=LONG_S)).split(b"used_memory:")[1].split()[0])
    await client.call("CONFIG", "SET", "maxmemory", used + room if room else 1, timeout_s=LONG_S)


async def make_room(client: Valkey) -> None:
    await client.call("CONFIG", "SET", "maxmemory", 0, timeout_s=LONG_S)


async def test_a_full_store_takes_no_events_and_answers_reads(place: Place) -> None:
    await fill_up(place.client)
    with pytest.raises(grpc.aio.AioRpcError, match="is full") as raised:
        await place.served.write(request(order(20, "a", 5.0)))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await place.values("shop", "a", "b") == [1.0, 2.0]
    assert await place.values("price", "a", "b") == [1.0, 2.0]
    await make_room(place.client)
    (answer,) = await place.served.write(request(order(20, "a", 5.0, NOW_US + 20)))
    assert (answer.accepted, answer.duplicates) == (1, 0)


async def test_events_that_found_the_store_full_on_their_way_are_counted_once_there_is_room(
    durable_valkey: ValkeyProcess, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await build(durable_valkey.url, folder, [SHOP])
    async with (
        serving(durable_valkey.url, definitions=DEFINITIONS, apply=False) as served,
        Valkey(durable_valkey.url) as client,
    ):
        await client.connected(LONG_S)
        await served.write(request(*(order(n, f"s{n % 100}", 1.0) for n in range(1, 401))))
        await fill_up(client)
        applying = asyncio.create_task(served.streams.applier.run())

        async def is_told() -> bool:
            return any("is full" in getattr(record, "reason", "") for record in caplog.records)

        await eventually(is_told)
        await make_room(client)
        await served.caught_up()
        applying.cancel()
        rows = await served.rows("shop", [f"s{n}" for n in range(100)], AS_OF_US)
        counts = np.frombuffer(rows.values, "<f4").reshape(100, -1)[:, SHOP.columns.index("orders_count")]
        assert counts.tolist() == [4.0] * 100


async def test_a_load_that_fills_the_store_is_not_published_and_gives_its_room_back(place: Place) -> None:
    ids = [f"{n}" * 20 for n in range(20_000)]
    await fill_up(place.client, room=2**20)
    generation = await place.store.begin(PRICE)
    with pytest.raises(Refused, match="is full"):
        await place.store.load(PRICE, generation, ids, NOW_US, np.ones((len(ids), 2)))
    assert await place.store.retire("price", generation, 0.0) > 0
    assert generation not in [one.number for one in await place.store.generations("price")]
    assert await place.values("price", "a", "b") == [1.0, 2.0]
    await place.put("price", ["a", "b"], [3.0, 4.0], 0)


async def test_a_log_whose_positions_begin_again_is_told_rather_than_skipped(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    await place.served.write(request(*(order(n, "a", 1.0) for n in range(10, 40))))
    await place.served.caught_up()
    keys = await place.client.call("KEYS", f"tf:{MESH}:seen:*", timeout_s=LONG_S)
    lost = [f"tf:{MESH}:log:orders", f"tf:{MESH}:position:orders", *keys]
    await place.client.call("DEL", *lost, timeout_s=LONG_S)
    await place.served.write(request(order(3, "a", 5.0)))

    async def is_told() -> bool:
        reasons = [str(getattr(record, "reason", "")) for record in caplog.records]
        return any("has counted 'orders' up to 32, but its log ends at 1" in reason for reason in reasons)

    await eventually(is_told)


async def test_a_store_that_was_emptied_is_built_again_only_where_its_files_count_once(
    place: Place, folder: Path
) -> None:
    await place.builder.archive.write(ORDERS)
    await place.client.call("FLUSHALL", timeout_s=LONG_S)
    await eventually(lambda: place.reads("shop", ["a", "b"], [None, None]))  # type: ignore[list-item]
    with pytest.raises(ArchiveError, match="it lost its log; rename the files log-orders-"):
        await place.builder.build(SHOP)
    assert await place.store.views() == []
    await place.served.write(request(order(3, "a", 5.0, NOW_US + 30)))
    with pytest.raises(ArchiveError, match="it lost its log"):
        await place.builder.archive.write(ORDERS)
    for file in (folder / "orders").glob("log-*"):
        file.rename(file.with_name(file.name.replace("log-", "history-")))
    await place.builder.build(SHOP)
    await eventually(lambda: place.reads("shop", ["a", "b"], [5.0, 2.0]))


async def test_files_that_reach_further_than_the_log_are_told(place: Place) -> None:
    await place.builder.archive.write(ORDERS)
    await place.client.call("SET", f"tf:{MESH}:position:orders", 1, timeout_s=LONG_S)
    with pytest.raises(Gap, match="no longer in its log"):
        await place.builder.build(SHOP)


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_a_stream_of_events_may_end_in_any_way_and_the_next_is_served(
    durable_valkey: ValkeyProcess, transport: str, folder: Path
) -> None:
    await build(durable_valkey.url, folder, [SHOP])
    async with serving(durable_valkey.url, transport, definitions=DEFINITIONS) as served:

        async def unending() -> AsyncIterator[pb.WriteEventsRequest]:
            for n in range(1, 100_000):
                yield request(order(n, "a", 1.0))

        cancelled = served.stub.WriteEvents(unending(), timeout=LONG_S)
        assert (await cancelled.read()).accepted == 1
        cancelled.cancel()
        deaf = served.stub.WriteEvents(unending(), timeout=LONG_S)  # it never reads an answer
        await asyncio.sleep(0.3)
        deaf.cancel()
        large = request(order(1, "a" * 2**25))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.write(large)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (answer,) = await served.write(request(order(2**63 - 1, "b", 3.0), order(2**63 - 1, "b", 4.0)))
        assert (answer.accepted, answer.duplicates) == (1, 1)
        await served.caught_up()
        rows = await served.rows("shop", ["b"], AS_OF_US)
        assert np.frombuffer(rows.values, "<f4")[LAST] == 3.0  # the first to come counts


async def test_a_producer_whose_clock_is_ahead_takes_nothing_from_the_windows_of_readers(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    brief = View("brief", "shop", windowed(ORDERS, "", (Aggregate.COUNT,), ("1m", "1h")), stream=True)
    await build(durable_valkey.url, folder, [brief])
    async with serving(durable_valkey.url, definitions=Definitions((brief,))) as served:
        ahead = order(9, known_us=NOW_US + 300_000_000)  # as far as events are taken from the future
        await served.write(request(order(1), order(2, known_us=NOW_US - 50_000_000), ahead))
        await served.caught_up()
        rows = await served.rows("brief", ["a"], NOW_US + 1)
        assert (np.frombuffer(rows.values, "<f4").tolist(), list(rows.status)) == ([2.0, 2.0], [OK, OK])
