"""The log in Parquet files, and generations built from both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from services.feature.define.definition import Aggregate, Source, View, windowed
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online.packed import MISSING, OK
from services.feature.online.valkey import Commands, Reply, Valkey, Word
from services.feature.stream.applier import Gap
from services.feature.stream.archive import Archive, Range, table_of
from services.feature.stream.log import Entry, EventLog, Group, Logged
from services.feature.stream.states import StateStore
from services.resilience.errors import Unavailable
from tests.conftest import ValkeyProcess
from tests.contract.streamed import (
    HOUR_US,
    LONG_S,
    MESH,
    NOW_US,
    ORDERS,
    SHOP,
    Serving,
    build,
    builder,
    eventually,
    order,
    request,
    serving,
)


def logged(n: int, shop: str = "a", known_us: int = 0) -> Logged:
    known_us = known_us or NOW_US + n
    return Logged(n, known_us - 1, known_us, {"shop": shop, "customer": "c"}, {}, {"amount": float(n)})


def in_files(folder: Path) -> list[int]:
    """The sequence numbers of all files, in order."""
    tables = [pa.parquet.read_table(path) for path in sorted((folder / "orders").glob("*.parquet"))]
    return [number for table in tables for number in table["order_id"].to_pylist()]


@pytest.fixture
async def client(durable_valkey: ValkeyProcess) -> AsyncIterator[Valkey]:
    async with Valkey(durable_valkey.url) as client:
        await client.connected(LONG_S)
        yield client


@pytest.fixture
def log(client: Valkey) -> EventLog:
    return EventLog(client, MESH)


@pytest.fixture
def archive(client: Valkey, log: EventLog, folder: Path) -> Archive:
    return Archive(client, MESH, log, str(folder))


async def append(log: EventLog, numbers: Iterable[int]) -> None:
    await log.append("orders", [Group([logged(n) for n in numbers])], LONG_S)


async def test_what_is_logged_is_in_files_once_and_as_it_was(log: EventLog, archive: Archive, folder: Path) -> None:
    assert await archive.write(ORDERS) is None
    events = [logged(7), Logged(3, 5, 9, {"shop": "b"}, {"kind": "x"}, {"amount": float("-inf")})]
    await log.append("orders", [Group(events)], LONG_S)
    assert await archive.write(ORDERS, least=3) is None  # not worth a file
    assert await archive.write(ORDERS) == Range(1, 2)
    assert await archive.write(ORDERS) is None
    (path,) = (folder / "orders").iterdir()
    assert path.name == "log-orders-0000000000000001-0000000000000002.parquet"
    columns = ("ordered_us", "known_us", "order_id", "shop", "customer", "kind", "amount")
    assert pa.parquet.read_table(path).to_pylist() == [
        dict(zip(columns, (NOW_US + 6, NOW_US + 7, 7, "a", "c", None, 7.0), strict=True)),
        dict(zip(columns, (5, 9, 3, "b", None, "x", float("-inf")), strict=True)),
    ]
    await append(log, range(10, 20))
    assert [await archive.write(ORDERS, most=4) for _ in range(4)] == [Range(3, 6), Range(7, 10), Range(11, 12), None]
    assert in_files(folder) == [7, 3, *range(10, 20)]


@dataclass
class Dying:
    """A client whose process dies before its n-th command, or after it where `after`."""

    client: Commands
    lives: int
    after: bool

    def call(self, *command: Word, timeout_s: float) -> Awaitable[Reply]:
        return self._call(*command, timeout_s=timeout_s)

    async def _call(self, *command: Word, timeout_s: float) -> Reply:
        self.lives -= 1
        if self.lives < 0 and not self.after:
            raise Unavailable("died")
        reply = await self.client.call(*command, timeout_s=timeout_s)
        if self.lives < 0:
            raise Unavailable("died")
        return reply


@pytest.mark.parametrize("after", [False, True])
async def test_an_archiver_that_dies_anywhere_leaves_every_event_once(
    client: Valkey, log: EventLog, archive: Archive, folder: Path, after: bool
) -> None:
    died = 0
    for lives in range(12):
        await append(log, range(10 * lives + 1, 10 * lives + 11))
        dying = Dying(client, lives, after)
        with contextlib.suppress(Unavailable):
            await Archive(dying, MESH, EventLog(dying, MESH), str(folder)).write(ORDERS)
        died += dying.lives < 0
        while await archive.write(ORDERS, most=7):
            pass
        await archive.trim(ORDERS, StateStore(client, MESH), {})
    assert in_files(folder) == list(range(1, 121))
    assert 5 <= died < 12
    assert await log.length("orders", LONG_S) == 0


async def test_archivers_at_once_write_every_event_once(
    client: Valkey, log: EventLog, archive: Archive, folder: Path
) -> None:
    states = StateStore(client, MESH)

    async def keep_archiving(most: int) -> None:
        for _ in range(25):
            if await archive.write(ORDERS, most=most):
                await archive.trim(ORDERS, states, {})
            await asyncio.sleep(0.002)

    async def keep_appending() -> None:
        for start in range(1, 400, 10):
            await append(log, range(start, start + 10))

    await asyncio.gather(keep_appending(), *(keep_archiving(most) for most in (5, 17, 40)))
    while await archive.write(ORDERS):
        pass
    assert in_files(folder) == list(range(1, 401))


async def test_the_log_keeps_what_is_not_archived_or_not_counted(
    durable_valkey: ValkeyProcess, client: Valkey, log: EventLog, archive: Archive, folder: Path
) -> None:
    built = await build(durable_valkey.url, folder)
    published = {name: one.generation for name, one in built.items()}
    states = StateStore(client, MESH)
    await append(log, range(1, 11))
    await archive.write(ORDERS, most=6)
    assert await archive.trim(ORDERS, states, published) == 0  # nobody counts them yet
    async with serving(durable_valkey.url) as served:
        await served.caught_up()
        assert await archive.trim(ORDERS, states, published, keep=2) == 4
        assert await archive.trim(ORDERS, states, published) == 2
        assert await log.first_position("orders", LONG_S) == 7


def write_history(folder: Path, numbers: Iterable[int], known_us: int = 0) -> None:
    entries = [Entry(n, logged(n, known_us=known_us)) for n in numbers]
    (folder / "orders").mkdir(exist_ok=True)
    pa.parquet.write_table(table_of(ORDERS, entries), folder / "orders" / "history.parquet")


async def shop_a(served: Serving) -> tuple[float, float]:
    """How many orders, and their sum."""
    found = await served.values("shop", ["a"], NOW_US + HOUR_US)
    return found["orders_count"][0], found["amount_sum"][0]


async def test_a_generation_counts_history_archive_and_log_once_each(
    durable_valkey: ValkeyProcess, log: EventLog, archive: Archive, folder: Path
) -> None:
    write_history(folder, range(1001, 1011))
    await append(log, range(1, 21))
    await archive.write(ORDERS, most=12)
    await log.trim("orders", 9, LONG_S)
    built = (await build(durable_valkey.url, folder))["shop"]
    assert (built.entities, built.events, built.positions) == (1, 22, {"orders": 20})
    async with serving(durable_valkey.url) as served:
        assert await shop_a(served) == (30.0, sum(range(1001, 1011)) + sum(range(1, 21)))
        await served.write(request(order(5, "a", 5.0), order(21, "a", 21.0, NOW_US + 21)))  # 5 was there before
        await served.caught_up()
        assert await shop_a(served) == (31.0, sum(range(1001, 1011)) + sum(range(1, 22)))


async def test_sources_that_share_files_do_not_count_each_others_archive(
    durable_valkey: ValkeyProcess, client: Valkey, log: EventLog, archive: Archive, folder: Path
) -> None:
    paid = Source("payments", ORDERS.path, "paid_us", "paid_us", "order_id", ("shop",), ("tip",))
    view = View("tips", "shop", windowed(paid, "tip", (Aggregate.SUM,), ("",)), stream=True)
    (folder / "orders").mkdir()
    both = table_of(ORDERS, [Entry(1, logged(1001))])
    both = both.append_column("paid_us", pa.array([NOW_US], pa.int64())).append_column("tip", pa.array([0.5]))
    pa.parquet.write_table(both.drop_columns(["kind"]), folder / "orders" / "history.parquet")
    await append(log, range(1, 5))
    await log.append("payments", [Group([Logged(9, 7, 7, {"shop": "a"}, {}, {"tip": 2.0})])], LONG_S)
    assert [await archive.write(source) for source in (ORDERS, paid)] == [Range(1, 4), Range(1, 1)]
    built = await build(durable_valkey.url, folder, [SHOP, view])
    assert (built["shop"].events, built["tips"].events) == (5, 2)
    for one, column, expected in ((SHOP, "amount_sum", 1001.0 + 10.0), (view, "tip_sum", 2.5)):
        computed = OfflineStore(folder).compute(one, Spine(["a"], np.array([NOW_US + HOUR_US])))
        assert computed.values[0, list(one.columns).index(column)] == expected


async def test_of_history_only_what_was_known_before_the_moment_counts_and_of_the_archive_all(
    durable_valkey: ValkeyProcess, log: EventLog, archive: Archive, folder: Path
) -> None:
    write_history(folder, range(1001, 1011))
    await append(log, range(1, 4))
    await archive.write(ORDERS)
    async with builder(durable_valkey.url, folder) as building:
        built = await building.build(SHOP, before_us=NOW_US + 1004)
    assert built.events == 3 + 3


async def test_a_log_that_lost_events_before_they_were_archived_is_told(
    durable_valkey: ValkeyProcess, log: EventLog, archive: Archive, folder: Path
) -> None:
    await append(log, range(1, 21))
    await archive.write(ORDERS, most=5)
    await log.trim("orders", 9, LONG_S)
    async with builder(durable_valkey.url, folder) as building:
        with pytest.raises(Gap, match="positions 6 to 9 are no longer in its log"):
            await building.build(SHOP)
        assert (await building.states.applied("orders", LONG_S)).positions == {}  # what failed holds nothing back
        assert await building.store.views(LONG_S) == []


async def test_views_built_again_while_events_come_and_the_log_is_archived_count_all_once(
    durable_valkey: ValkeyProcess, log: EventLog, folder: Path
) -> None:
    write_history(folder, range(5001, 5011))
    await build(durable_valkey.url, folder)
    last = 2_000
    options = {"archive": str(folder), "archive_least": 100, "archive_s": 0.03}
    async with serving(durable_valkey.url, **options) as served:
        done = asyncio.Event()

        async def keep_writing() -> None:
            for start in range(1, last, 20):
                orders = [order(n, "a", float(n), NOW_US + n) for n in range(start, start + 20)]
                await served.write(request(*orders))
            done.set()

        async def keep_building() -> int:
            generations = 0
            while not done.is_set():
                generations = (await build(durable_valkey.url, folder))["shop"].generation
            return generations

        _, generation = await asyncio.gather(keep_writing(), keep_building())
        assert generation >= 5
        await served.caught_up()
        everything = (10.0 + last, sum(range(5001, 5011)) + last * (last + 1) / 2)

        async def is_exact() -> bool:
            return await shop_a(served) == everything

        await eventually(is_exact)
        await asyncio.sleep(0.2)
        assert await is_exact()
        assert await log.length("orders", LONG_S) < 200


async def test_what_generations_before_the_published_one_counted_is_forgotten(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    async with builder(durable_valkey.url, folder) as building:
        first, second, newest = [(await building.build(SHOP)).generation for _ in range(3)]
        assert first < second < newest
        assert (await building.states.built(LONG_S)).keys() == {f"shop:{newest}"}
        assert (await building.states.applied("orders", LONG_S)).positions.keys() == {f"shop:{newest}"}


async def test_what_training_reads_from_the_archive_is_what_serving_counted(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    write_history(folder, range(1001, 1011))
    await build(durable_valkey.url, folder)
    async with serving(durable_valkey.url, archive=str(folder), archive_least=1, archive_s=0.02) as served:
        for start in range(1, 60, 6):
            orders = [
                order(n, f"s{n % 4}", None if n % 5 == 0 else n / 7, NOW_US + n * 97_000_000)
                for n in range(start, start + 6)
            ]
            await served.write(request(*orders))
        await served.caught_up()

        async def is_archived() -> bool:
            return len(in_files(folder)) == 70

        await eventually(is_archived)
        ids = ["a", "s0", "s1", "s2", "s3", "nobody"]
        for moment_us in (NOW_US + 60 * 97_000_000 + 1, NOW_US + 3 * HOUR_US, NOW_US + 20 * HOUR_US):
            stored = await served.rows("shop", ids, moment_us)
            offline = OfflineStore(folder).compute(SHOP, Spine(ids, np.full(len(ids), moment_us)))
            status = np.frombuffer(stored.status, np.uint8).reshape(len(ids), -1)
            assert ((status == OK) == ~offline.null).all()
            assert ((status == MISSING).all(axis=1) == ~offline.known).all()
            values = np.frombuffer(stored.values, "<f4").reshape(len(ids), -1)
            np.testing.assert_array_equal(values, offline.float32())
