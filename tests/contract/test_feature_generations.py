"""Generations: loaded while nobody reads them, published by one pointer, removed when nobody reads them any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest

from services.feature.define.schema import ViewSchema
from services.feature.online import generations
from services.feature.online.generations import UNREAD, Generation
from services.feature.online.packed import RowLayout
from services.feature.online.store import OnlineStore, PublishedView
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.resilience.errors import BadInput, NotFound, Refused, Unavailable

LONG_S = 10.0
EVENT_US = 1_384_000_000_000_000
SCHEMA = ViewSchema("route", "route", ("late_28d", "flights_28d"))
DEST = ViewSchema("dest", "dest", ("late",))
WIDER = ViewSchema("route", "route", ("late_28d", "flights_28d", "delay_28d"))
IDS = [f"e{i}" for i in range(300)]


@pytest.fixture
async def client(valkey: str) -> AsyncIterator[Valkey]:
    async with Valkey(valkey) as client:
        await client.connected(LONG_S)
        yield client


@pytest.fixture
def store(client: Valkey) -> OnlineStore:
    return OnlineStore(ValkeyTable(client), "test")


def rows_of(value: float, n: int = len(IDS), schema: ViewSchema = SCHEMA) -> np.ndarray:
    return np.full((n, len(schema.columns)), value)


async def loaded(store: OnlineStore, value: float, schema: ViewSchema = SCHEMA) -> int:
    generation = await store.begin(schema)
    await store.load(schema, generation, IDS, EVENT_US, rows_of(value, schema=schema))
    return generation


async def published(store: OnlineStore, value: float, watermark_us: int = EVENT_US, grace_s: float = 60.0) -> int:
    generation = await loaded(store, value)
    await store.publish([SCHEMA], watermark_us, {"route": len(IDS)}, {"route": generation}, grace_s=grace_s)
    return generation


async def view_of(store: OnlineStore, name: str = "route") -> PublishedView:
    return next(view for view in await store.views() if view.name == name)


async def read(store: OnlineStore, view: PublishedView, ids: list[str] = IDS) -> list[float]:
    """The first column of each entity, as a reader who knows this view sees it; NaN where nothing is readable."""
    prefix = store.key_prefix(view.name, view.generation)
    stored = await store.fetch([f"{prefix}{entity_id}}}" for entity_id in ids], LONG_S)
    rows = RowLayout(view.schema()).unpack(stored, EVENT_US, foreign_is_missing=True)
    return np.frombuffer(rows.values, "<f4").reshape(len(ids), -1)[:, 0].tolist()


async def keys(client: Valkey) -> int:
    """How many rows there are, of whatever generation."""
    return int(await client.call("DBSIZE", timeout_s=LONG_S)) - 1


async def test_a_generation_is_read_only_once_it_is_published(store: OnlineStore) -> None:
    await store.write(SCHEMA, IDS, EVENT_US, rows_of(1.0))
    await store.publish([SCHEMA], EVENT_US, {"route": len(IDS)})
    generation = await loaded(store, 2.0)
    assert await read(store, await view_of(store)) == [1.0] * len(IDS)
    done = await store.publish([SCHEMA], EVENT_US + 1, {"route": len(IDS)}, {"route": generation})
    assert (done.replaced, done.overtaken) == ({"route": 0}, {})
    view = await view_of(store)
    assert (view.generation, view.watermark_us, view.kind) == (generation, EVENT_US + 1, "row")
    assert await read(store, view) == [2.0] * len(IDS)


async def test_a_reader_that_does_not_know_yet_reads_the_generation_before_whole(store: OnlineStore) -> None:
    first = await published(store, 1.0)
    known = await view_of(store)
    await published(store, 2.0)
    assert await read(store, known) == [1.0] * len(IDS)
    assert await store.retire("route", first, grace_s=0.0) == len(IDS)
    assert await read(store, await view_of(store)) == [2.0] * len(IDS)
    assert np.isnan(await read(store, known)).all()


async def test_readers_never_see_a_mix_while_generations_come_and_go(store: OnlineStore) -> None:
    await published(store, 1.0)
    stop = asyncio.Event()
    seen: set[float] = set()

    async def keep_reading() -> None:
        while not stop.is_set():
            values = await read(store, await view_of(store))
            assert len(set(values)) == 1
            seen.add(values[0])

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_reading())
        for value in range(2, 12):
            await published(store, float(value))
            await asyncio.sleep(0.005)
        stop.set()
    assert len(seen) > 2


async def test_the_rows_before_generations_leave_too(store: OnlineStore, client: Valkey) -> None:
    await store.write(SCHEMA, IDS, EVENT_US, rows_of(1.0))
    await store.publish([SCHEMA], EVENT_US, {"route": len(IDS)})
    await published(store, 2.0)
    assert await keys(client) == 2 * len(IDS)
    assert await store.retire("route", 0, grace_s=0.0) == len(IDS)
    assert await keys(client) == len(IDS)


async def test_materialisations_that_begin_at_once_have_generations_of_their_own(valkey: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Valkey(valkey)) for _ in range(4)]
        for client in clients:
            await client.connected(LONG_S)
        stores = [OnlineStore(ValkeyTable(client), "test") for client in clients]
        began = await asyncio.gather(*(one.begin(schema) for one in stores for schema in (SCHEMA, DEST)))
        assert len(set(began)) == 8


@pytest.mark.parametrize("later_first", [True, False])
async def test_of_two_materialisations_at_once_the_later_watermark_wins(
    store: OnlineStore, client: Valkey, later_first: bool
) -> None:
    earlier, later = await loaded(store, 1.0), await loaded(store, 2.0)
    runs = [(earlier, EVENT_US), (later, EVENT_US + 1)]
    outcomes = {}
    for generation, watermark_us in reversed(runs) if later_first else runs:
        done = await store.publish([SCHEMA], watermark_us, {"route": 300}, {"route": generation}, grace_s=0.0)
        outcomes[generation] = dict(done.overtaken)
    assert outcomes == {earlier: {"route": earlier} if later_first else {}, later: {}}
    view = await view_of(store)
    assert (view.generation, view.watermark_us) == (later, EVENT_US + 1)
    assert await read(store, view) == [2.0] * len(IDS)
    await store.publish([SCHEMA], EVENT_US + 1, {"route": 300}, {"route": later}, grace_s=0.0)
    assert await keys(client) == len(IDS)
    assert [one.number for one in await store.generations("route")] == [later]


async def test_of_two_with_one_watermark_that_begun_last_wins_whole(store: OnlineStore) -> None:
    first, second = await loaded(store, 1.0), await loaded(store, 2.0)
    await store.publish([SCHEMA], EVENT_US, {"route": 300}, {"route": second})
    done = await store.publish([SCHEMA], EVENT_US, {"route": 300}, {"route": first})
    assert done.overtaken == {"route": first}
    assert await read(store, await view_of(store)) == [2.0] * len(IDS)


async def test_an_earlier_moment_is_published_where_that_is_wanted(store: OnlineStore) -> None:
    await published(store, 2.0, EVENT_US + 5)
    back = await loaded(store, 1.0)
    done = await store.publish([SCHEMA], EVENT_US, {"route": 300}, {"route": back}, even_if_older=True)
    assert done.overtaken == {}
    view = await view_of(store)
    assert (view.generation, view.watermark_us) == (back, EVENT_US)


async def test_publications_at_once_of_several_views_leave_each_view_whole(valkey: str) -> None:
    async with Valkey(valkey) as one, Valkey(valkey) as two:
        stores = []
        for client in (one, two):
            await client.connected(LONG_S)
            stores.append(OnlineStore(ValkeyTable(client), "test"))

        async def run(store: OnlineStore, watermark_us: int) -> None:
            numbers = {schema.name: await loaded(store, watermark_us - EVENT_US, schema) for schema in (SCHEMA, DEST)}
            await store.publish([SCHEMA, DEST], watermark_us, {"route": 300, "dest": 300}, numbers)

        await asyncio.gather(*(run(stores[i % 2], EVENT_US + i) for i in range(3)))
        for view in await stores[0].views():
            assert view.watermark_us == EVENT_US + 2
            assert await read(stores[0], view) == [2.0] * len(IDS)


async def test_publishing_the_same_again_changes_nothing(store: OnlineStore) -> None:
    generation = await published(store, 1.0)
    before = await view_of(store), await store.generations("route")
    done = await store.publish([SCHEMA], EVENT_US, {"route": 300}, {"route": generation})
    assert (done.replaced, done.overtaken) == ({}, {})
    assert (await view_of(store), await store.generations("route")) == before


async def test_what_crashed_between_publishing_and_retiring_is_removed_by_the_next(
    store: OnlineStore, client: Valkey
) -> None:
    await published(store, 1.0)
    await published(store, 2.0)  # and nobody retires the first
    assert await keys(client) == 2 * len(IDS)
    last = await published(store, 3.0, grace_s=0.0)
    assert await keys(client) == len(IDS)
    assert [one.number for one in await store.generations("route")] == [last]


async def test_within_the_grace_nothing_is_removed(store: OnlineStore, client: Valkey) -> None:
    for value in (1.0, 2.0, 3.0):
        await published(store, value, grace_s=60.0)
    assert await keys(client) == 3 * len(IDS)


async def test_loads_that_crash_again_and_again_do_not_fill_the_store(store: OnlineStore, client: Valkey) -> None:
    await published(store, 1.0)
    for value in range(10):
        await loaded(store, float(value))
    assert await keys(client) == (generations.MOST_UNFINISHED + 1) * len(IDS)
    assert await read(store, await view_of(store)) == [1.0] * len(IDS)


async def test_a_generation_that_was_taken_for_crashed_cannot_be_published(store: OnlineStore) -> None:
    slow = await loaded(store, 1.0)
    for _ in range(generations.MOST_UNFINISHED):
        await loaded(store, 2.0)
    with pytest.raises(NotFound, match=f"generation {slow} of view 'route' is not there"):
        await store.publish([SCHEMA], EVENT_US, {"route": 300}, {"route": slow})
    with pytest.raises(NotFound, match="generation 77 of view 'dest' is not there"):
        await store.publish([DEST, SCHEMA], EVENT_US, {"route": 300, "dest": 1}, {"dest": 77})
    assert await store.views() == []


async def test_what_is_published_is_never_removed(store: OnlineStore) -> None:
    generation = await published(store, 1.0)
    with pytest.raises(ValueError, match=f"generation {generation} of view 'route' is published"):
        await store.retire("route", generation, grace_s=0.0)
    assert await read(store, await view_of(store)) == [1.0] * len(IDS)


async def test_a_loaded_row_never_expires_by_itself(store: OnlineStore, client: Valkey) -> None:
    brief = ViewSchema("brief", "entity", ("a",), ttl_s=60.0)
    now_us = int((await client.call("TIME", timeout_s=LONG_S))[0]) * 1_000_000
    generation = await store.begin(brief)
    await store.load(brief, generation, ["x"], now_us, np.ones((1, 1)))
    assert await client.call("TTL", f"{store.key_prefix('brief', generation)}x}}", timeout_s=LONG_S) == -1


async def test_a_write_goes_where_the_view_is_read(store: OnlineStore) -> None:
    await published(store, 1.0)
    assert await store.write(SCHEMA, ["e0", "new"], EVENT_US + 1, rows_of(5.0, 2)) == 2
    assert await store.write(SCHEMA, ["e1"], EVENT_US - 1, rows_of(6.0, 1)) == 0
    assert await read(store, await view_of(store), ["e0", "new", "e1"]) == [5.0, 5.0, 1.0]
    await store.publish([SCHEMA], EVENT_US + 1, {"route": 301})  # stays where it is
    view = await view_of(store)
    assert (view.rows, view.watermark_us) == (301, EVENT_US + 1)
    assert await read(store, view, ["new"]) == [5.0]


async def test_a_write_that_a_publication_overtakes_is_made_again_where_readers_are_now(valkey: str) -> None:
    async with Valkey(valkey) as one, Valkey(valkey) as two:
        for client in (one, two):
            await client.connected(LONG_S)
        materialiser = OnlineStore(ValkeyTable(two), "test")
        await published(materialiser, 1.0)
        writer = OnlineStore(ValkeyTable(one), "test")
        await writer.write(SCHEMA, ["e0"], EVENT_US + 1, rows_of(2.0, 1))
        await published(materialiser, 3.0)
        # the writer still believes in the generation before
        assert await writer.write(SCHEMA, ["e1"], EVENT_US + 1, rows_of(4.0, 1)) == 1
        assert await read(writer, await view_of(writer), ["e0", "e1"]) == [3.0, 4.0]


async def test_another_schema_is_published_as_a_generation_and_in_no_other_way(store: OnlineStore) -> None:
    await published(store, 1.0)
    known = await view_of(store)
    with pytest.raises(BadInput, match=r"schema_hash: must be .* load and publish a generation of it"):
        await store.write(WIDER, IDS, EVENT_US + 1, rows_of(2.0, schema=WIDER))
    with pytest.raises(BadInput, match="schema_hash: must be"):
        await store.publish([WIDER], EVENT_US + 1, {"route": 300})
    assert await read(store, await view_of(store)) == [1.0] * len(IDS)
    generation = await loaded(store, 2.0, WIDER)
    await store.publish([WIDER], EVENT_US + 1, {"route": 300}, {"route": generation})
    assert await read(store, await view_of(store)) == [2.0] * len(IDS)
    assert await read(store, known) == [1.0] * len(IDS)


async def test_a_sample_is_read_back_and_compared(store: OnlineStore, client: Valkey) -> None:
    values = np.random.default_rng(3).normal(size=(300, 2))
    values[::3, 1] = np.nan
    times = EVENT_US + np.arange(300)
    generation = await store.begin(SCHEMA)
    await store.load(SCHEMA, generation, IDS, times, values)
    assert await store.verify(SCHEMA, generation, IDS, times, values) == 256
    assert await store.verify(SCHEMA, generation, [], EVENT_US, np.empty((0, 2))) == 0
    key = f"{store.key_prefix('route', generation)}e0}}"
    for change, told in (
        (("SETRANGE", key, 34, "!"), "not what was loaded"),
        (("UNLINK", key), "missing"),
    ):
        await client.call(*change, timeout_s=LONG_S)
        with pytest.raises(Unavailable, match=f"row of 'e0' in generation {generation} of view 'route' is {told}"):
            await store.verify(SCHEMA, generation, IDS, times, values)
    await store.load(SCHEMA, generation, IDS, times, values + 1)
    with pytest.raises(Unavailable, match="not what was loaded"):
        await store.verify(SCHEMA, generation, IDS, times, values)


@pytest.mark.parametrize(
    ("generation", "entity_ids", "values", "told"),
    [
        (0, ["a"], np.ones((1, 2)), "generation must be one that was begun, at least 1, got 0"),
        (1, ["a"], np.ones((2, 2)), "one entity id per row, got 1 ids and 2 rows"),
        (1, ["a", ""], np.ones((2, 2)), "must have 1 to 256 bytes, got ''"),
        (1, ["a", "ü" * 129], np.ones((2, 2)), "must have 1 to 256 bytes"),
        (1, ["a", "b"], np.ones((2, 3)), "must have shape"),
    ],
)
async def test_a_load_that_does_not_fit_changes_nothing(
    store: OnlineStore, client: Valkey, generation: int, entity_ids: list[str], values: np.ndarray, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        await store.load(SCHEMA, generation, entity_ids, EVENT_US, values)
    assert await client.call("DBSIZE", timeout_s=LONG_S) == 0


async def test_a_large_load_stores_every_row(store: OnlineStore) -> None:
    ids = [f"e{i}" for i in range(20_000)]
    values = np.arange(40_000.0).reshape(20_000, 2)
    generation = await store.begin(SCHEMA)
    await store.load(SCHEMA, generation, ids, EVENT_US, values)
    await store.publish([SCHEMA], EVENT_US, {"route": 20_000}, {"route": generation})
    assert await read(store, await view_of(store), ids) == values[:, 0].tolist()


async def test_a_view_published_before_there_were_generations_is_read_and_replaced(
    store: OnlineStore, client: Valkey
) -> None:
    before = {
        "name": "route",
        "entity": "route",
        "columns": list(SCHEMA.columns),
        "ttl_s": 0.0,
        "schema_hash": f"{SCHEMA.schema_hash:016x}",
        "watermark_us": EVENT_US,
        "rows": 300,
    }
    await client.call("HSET", "tf:test:views", "route", json.dumps(before), timeout_s=LONG_S)
    await store.write(SCHEMA, IDS, EVENT_US, rows_of(1.0))
    view = await view_of(store)
    assert (view.generation, view.kind) == (0, "row")
    assert await read(store, view) == [1.0] * len(IDS)
    assert await published(store, 2.0) > 0
    assert await read(store, await view_of(store)) == [2.0] * len(IDS)


async def test_a_damaged_registry_is_told_and_mended_by_publishing(store: OnlineStore, client: Valkey, caplog) -> None:
    await published(store, 1.0)
    for field in ("route", "#route", "#next"):
        await client.call("HSET", "tf:test:views", field, "{torn", timeout_s=LONG_S)
    store = OnlineStore(ValkeyTable(client), "test")
    with pytest.raises(Unavailable, match="what is published of view 'route' cannot be read"):
        await store.write(SCHEMA, IDS, EVENT_US, rows_of(2.0))
    assert await store.views() == []
    await published(store, 3.0)
    assert await read(store, await view_of(store)) == [3.0] * len(IDS)
    assert {record.message for record in caplog.records if record.levelname == "WARNING"} == {
        "published view unreadable"
    }


async def test_a_registry_of_another_type_is_unavailable_to_all(store: OnlineStore, client: Valkey) -> None:
    await client.call("SET", "tf:test:views", "x", timeout_s=LONG_S)
    for call in (
        store.views(),
        store.begin(SCHEMA),
        store.write(SCHEMA, IDS, EVENT_US, rows_of(1.0)),
        store.publish([SCHEMA], EVENT_US, {"route": 1}),
    ):
        with pytest.raises(Unavailable, match="WRONGTYPE"):
            await call


async def test_a_full_store_refuses_writes_says_so_and_still_answers(store: OnlineStore, client: Valkey) -> None:
    generation = await published(store, 1.0)
    await client.call("CONFIG", "SET", "maxmemory", 1, timeout_s=LONG_S)
    for call in (
        store.write(SCHEMA, ["new"], EVENT_US, rows_of(1.0, 1)),
        store.load(SCHEMA, generation + 1, ["new"], EVENT_US, rows_of(1.0, 1)),
        store.begin(SCHEMA),
        store.publish([SCHEMA], EVENT_US, {"route": 1}),
    ):
        with pytest.raises(Refused, match=r"is full \(its maxmemory is reached\) and takes no writes; reads go on"):
            await call
    assert await read(store, await view_of(store)) == [1.0] * len(IDS)
    await client.call("CONFIG", "SET", "maxmemory", 0, timeout_s=LONG_S)
    assert await store.write(SCHEMA, ["new"], EVENT_US, rows_of(1.0, 1)) == 1


async def test_a_store_that_dies_during_a_load_fails_it_and_a_new_run_succeeds(valkey_process) -> None:
    async with Valkey(valkey_process.url) as client:
        await client.connected(LONG_S)
        store = OnlineStore(ValkeyTable(client), "test")
        generation = await store.begin(SCHEMA)
        valkey_process.freeze()
        ids = [f"e{i}" for i in range(30_000)]
        loading = asyncio.ensure_future(store.load(SCHEMA, generation, ids, EVENT_US, rows_of(1.0, 30_000)))
        await asyncio.sleep(0.05)
        valkey_process.kill()
        with pytest.raises(Unavailable):
            await loading
        valkey_process.start()
        await client.connected(LONG_S)
        await published(store, 2.0)
        assert await read(store, await view_of(store)) == [2.0] * len(IDS)


def test_generations_are_over_once_nobody_reads_them() -> None:
    day_us = round(generations.LONGEST_LOAD_S * 1e6)
    listed = [
        Generation(1, 10, retired_us=100),
        Generation(2, 20, retired_us=UNREAD),
        Generation(3, 30),  # published
        Generation(4, 40),  # being loaded
        Generation(0, 5, retired_us=190),
    ]
    assert generations.over(listed, 3, now_us=200, grace_us=100) == [1, 2]
    assert generations.over(listed, 3, now_us=290, grace_us=100) == [1, 2, 0]
    assert generations.over(listed, 3, now_us=40 + day_us, grace_us=100) == [1, 2, 4, 0]
    assert generations.over(listed, 3, now_us=40 + day_us, grace_us=10**15) == [4]


def test_a_generation_keeps_the_moment_it_was_first_retired() -> None:
    listed = generations.flipped([Generation(1, 10), Generation(2, 20)], number=2, before=1, now_us=50)
    assert listed == [Generation(1, 10, 50), Generation(2, 20)]
    assert generations.given_up(listed, 1)[-1] == Generation(1, 10, 50)
    assert not generations.open_for_publishing(listed, 1)
    assert generations.open_for_publishing(listed, 2)
