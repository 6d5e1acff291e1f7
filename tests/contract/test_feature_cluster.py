"""A cluster of three masters as a table: slots, moving slots, and nodes that are gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from services.feature.online.cluster import ClusterTable, seeds_of
from services.feature.online.slots import SLOTS, Node, owners, redirection, slot_of
from services.feature.online.store import OnlineStore
from services.feature.online.table import PartlyUnavailable
from services.feature.online.tables import check_url, open_table
from services.feature.online.valkey import Address, Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.service import FeatureService
from services.feature.settings import FeatureSettings
from services.resilience.call import Call, Caller
from services.resilience.errors import CallError, DeadlineExceeded, Refused, Unavailable
from tests.contract import valkey_cluster
from tests.contract.table_contract import CHECKS, EVENT_US, SCHEMA, Check, row
from tests.contract.valkey_cluster import NODES, ValkeyCluster

LONG_S = 20.0


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[ValkeyCluster]:
    with valkey_cluster.running() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: ValkeyCluster) -> ValkeyCluster:
    """Empty; whole before and after."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture
def own_cluster() -> Iterator[ValkeyCluster]:
    """One whose nodes a test may kill."""
    with valkey_cluster.running() as cluster:
        yield cluster


@pytest.fixture
async def table(cluster: ValkeyCluster) -> AsyncIterator[ClusterTable]:
    async with ClusterTable(cluster.url) as table:
        await table.connected(LONG_S)
        yield table


def keys_of(cluster: ValkeyCluster, node: int, n: int) -> list[str]:
    """Keys that a node was given at the start."""
    found = (f"k{i}" for i in range(100_000))
    return [key for key, _ in zip((key for key in found if cluster.owner(key) == node), range(n), strict=False)]


def one_slot(n: int) -> list[str]:
    return [f"v{i}:{{entity}}" for i in range(n)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_cluster_is_a_table(table: ClusterTable, check: Check) -> None:
    await check(table)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_one_valkey_is_a_table(valkey: str, check: Check) -> None:
    async with Valkey(valkey) as client:
        await client.connected(LONG_S)
        await check(ValkeyTable(client))


async def test_slots_are_those_of_the_server(cluster: ValkeyCluster) -> None:
    names = ["", "a", "tf:m:7:{JFK-LAX}", "{}x", "{}{a}", "a{b}c{d}", "{{a}}", "a{b", "}a{b}", "ü{é}"]
    assert [slot_of(name) for name in names] == [
        cluster.ask(cluster.ports[0], "CLUSTER", "KEYSLOT", name) for name in names
    ]


async def test_views_of_an_entity_share_a_slot_whatever_their_generation(table: ClusterTable) -> None:
    store = OnlineStore(table, "test")
    keys = [f"{store.key_prefix(view, generation)}JFK}}" for view in ("route", "dest") for generation in (0, 1, 77)]
    assert {slot_of(key) for key in keys} == {slot_of("JFK")}


async def test_rows_of_all_nodes_are_written_published_and_read(table: ClusterTable, cluster: ValkeyCluster) -> None:
    store = OnlineStore(table, "test")
    ids = [f"e{i}" for i in range(3000)]
    values = np.arange(6000.0).reshape(3000, 2)
    generation = await store.begin(SCHEMA)
    await store.load(SCHEMA, generation, ids, EVENT_US, values)
    assert await store.verify(SCHEMA, generation, ids, EVENT_US, values) == 256
    await store.publish([SCHEMA], EVENT_US, {"route": 3000}, {"route": generation})
    assert await store.write(SCHEMA, ids[:500], EVENT_US + 1, values[:500]) == 500
    assert await store.write(SCHEMA, ids, EVENT_US, values) == 2500
    assert min(cluster.ask(port, "DBSIZE") for port in cluster.ports) > 800
    (view,) = await store.views()
    keys = [f"{store.key_prefix('route', view.generation)}{entity_id}}}" for entity_id in ids]
    assert None not in await store.fetch(keys, LONG_S)


async def test_a_moved_slot_is_found_and_remembered(table: ClusterTable, cluster: ValkeyCluster) -> None:
    keys = one_slot(20)
    slot, source = slot_of(keys[0]), cluster.owner(keys[0])
    target = (source + 1) % NODES
    rows = [row(EVENT_US, i) for i in range(20)]
    await table.load(keys, rows, LONG_S)
    try:
        cluster.begin_move(slot, source, target)
        cluster.move_keys(keys, source, target)
        cluster.end_move(slot, target, source)
        assert await table.fetch(keys, LONG_S) == rows
        assert await table.keep_newest(keys, [row(EVENT_US + 1)] * 20, [0] * 20, LONG_S) == 20
        before = redirections(cluster)
        assert await table.fetch(keys, LONG_S) == [row(EVENT_US + 1)] * 20
        assert redirections(cluster) == before
    finally:
        cluster.undo_move(slot, source, target)


async def test_while_a_slot_moves_every_key_is_read_and_written_once(
    table: ClusterTable, cluster: ValkeyCluster
) -> None:
    keys = one_slot(20)
    slot, source = slot_of(keys[0]), cluster.owner(keys[0])
    target = (source + 1) % NODES
    rows = [row(EVENT_US, i) for i in range(20)]
    await table.load(keys, rows, LONG_S)
    try:
        cluster.begin_move(slot, source, target)
        cluster.move_keys(keys[:10], source, target)
        wanted = [*keys, "none:{entity}"]
        assert await table.fetch(wanted, LONG_S) == [*rows, None]
        newer = [row(EVENT_US + 1, i) for i in range(20)]
        assert await table.keep_newest(keys, rows, [0] * 20, LONG_S) == 20  # of the same time
        assert await table.keep_newest(keys, newer, [0] * 20, LONG_S) == 20
        assert await table.keep_newest(keys, rows, [0] * 20, LONG_S) == 0
        assert await table.fetch(keys, LONG_S) == newer
        await table.load(keys, rows, LONG_S)
        assert await table.fetch(keys, LONG_S) == rows
        assert await table.swap_map("m{entity}", {"a": None}, {"a": b"1"}, LONG_S)
        assert await table.read_map("m{entity}", LONG_S) == {"a": b"1"}
        assert await table.drop("v", LONG_S) == 20
        assert await table.fetch(keys, LONG_S) == [None] * 20
    finally:
        cluster.undo_move(slot, source, target)


async def test_readers_and_writers_see_no_error_while_a_slot_moves(table: ClusterTable, cluster: ValkeyCluster) -> None:
    keys = one_slot(40)
    slot, source = slot_of(keys[0]), cluster.owner(keys[0])
    target = (source + 1) % NODES
    await table.load(keys, [row(EVENT_US)] * 40, LONG_S)
    stop = asyncio.Event()
    moved = asyncio.Event()
    after = 0

    async def keep_reading() -> None:
        nonlocal after
        while not stop.is_set():
            assert None not in await table.fetch(keys, LONG_S)
            after += moved.is_set()
            if after == 3:
                stop.set()

    async def keep_writing() -> None:
        while not stop.is_set():
            assert await table.keep_newest(keys, [row(EVENT_US)] * 40, [0] * 40, LONG_S) == 40

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_reading())
            tasks.create_task(keep_writing())
            await asyncio.to_thread(cluster.begin_move, slot, source, target)
            for key in keys:
                await asyncio.to_thread(cluster.move_keys, [key], source, target)
            await asyncio.to_thread(cluster.end_move, slot, target, source)
            moved.set()
        assert after == 3
    finally:
        cluster.undo_move(slot, source, target)


async def test_a_killed_node_takes_its_own_keys_and_no_others(own_cluster: ValkeyCluster) -> None:
    async with ClusterTable(own_cluster.url) as table:
        await table.connected(LONG_S)
        by_node = [keys_of(own_cluster, node, 20) for node in range(NODES)]
        keys = [key for theirs in by_node for key in theirs]
        await table.load(keys, [row(EVENT_US)] * 60, LONG_S)
        own_cluster.kill(1)
        gone = 0
        began = time.monotonic()
        # also after the others have agreed that it failed
        while time.monotonic() < began + 4.0:
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await table.fetch(by_node[1], 1.0)
            with pytest.raises(PartlyUnavailable) as caught:
                await table.fetch(keys, 1.0)
            assert caught.value.failed == set(by_node[1])
            assert [value for key, value in zip(keys, caught.value.values, strict=True) if key not in by_node[1]] == [
                row(EVENT_US)
            ] * 40
            for theirs in (by_node[0], by_node[2]):
                assert await table.fetch(theirs, 1.0) == [row(EVENT_US)] * 20
                assert await table.keep_newest(theirs, [row(EVENT_US)] * 20, [0] * 20, 1.0) == 20
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await table.keep_newest(by_node[1], [row(EVENT_US)] * 20, [0] * 20, 1.0)
            await table.ping(1.0)
            gone += 1
            await asyncio.sleep(0.05)
        assert gone > 1
        with pytest.raises(CallError):
            await table.drop("k", LONG_S)


async def test_a_frozen_node_costs_its_keys_the_timeout_and_comes_back(own_cluster: ValkeyCluster) -> None:
    async with ClusterTable(own_cluster.url) as table:
        await table.connected(LONG_S)
        there, frozen = keys_of(own_cluster, 0, 5), keys_of(own_cluster, 1, 5)
        await table.load([*there, *frozen], [row(EVENT_US)] * 10, LONG_S)
        own_cluster.freeze(1)
        with pytest.raises(DeadlineExceeded, match="did not answer within 100 ms"):
            await table.fetch(frozen, 0.1)
        with pytest.raises(PartlyUnavailable, match=r"5 of 10 keys: .* did not answer within") as caught:
            await table.fetch([*there, *frozen], 0.1)
        assert caught.value.failed == set(frozen)
        assert await table.fetch(there, LONG_S) == [row(EVENT_US)] * 5
        own_cluster.thaw(1)
        async with asyncio.timeout(LONG_S):
            while True:
                with contextlib.suppress(Unavailable, DeadlineExceeded):
                    assert await table.fetch(frozen, 0.2) == [row(EVENT_US)] * 5
                    break
                await asyncio.sleep(0.01)


async def test_callers_who_travel_with_keys_of_a_killed_node_get_theirs(own_cluster: ValkeyCluster) -> None:
    settings = FeatureSettings(
        mesh_file=Path("tenfold.toml"), listen="unix:/tmp/none", instance="f", store=own_cluster.url, max_in_flight=1
    )
    async with ClusterTable(own_cluster.url) as table:
        await table.connected(LONG_S)
        service = FeatureService(OnlineStore(table, "test"), settings)
        keys = [keys_of(own_cluster, node, 2) for node in range(NODES)]
        await table.load([key for theirs in keys for key in theirs], [row(EVENT_US)] * 6, LONG_S)
        own_cluster.kill(1)
        asked = [keys[0], keys[1], keys[2], [keys[0][0], keys[1][0]]]
        outcomes = await asyncio.gather(
            *(service.reads.ask(Call(some, Caller())) for some in asked), return_exceptions=True
        )
        assert (service.reads.batches, service.reads.members) == (1, 4)
        assert outcomes[0] == outcomes[2] == [row(EVENT_US)] * 2
        assert {type(outcomes[1]), type(outcomes[3])} == {PartlyUnavailable}


async def test_a_failing_node_has_the_map_read_again_at_most_once_a_second(own_cluster: ValkeyCluster) -> None:
    async with ClusterTable(own_cluster.url) as table:
        await table.connected(LONG_S)
        key = keys_of(own_cluster, 1, 1)
        own_cluster.kill(1)
        began, before = time.monotonic(), map_reads(own_cluster)
        for _ in range(300):
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await table.fetch(key, 1.0)
            await asyncio.sleep(0.005)
        assert map_reads(own_cluster) - before <= time.monotonic() - began + 1


async def test_a_cluster_that_is_not_there_is_told_with_its_reason() -> None:
    async with ClusterTable("redis+cluster://127.0.0.1:1") as table:
        with pytest.raises(Unavailable, match=r"it is not known where keys of the cluster at 127\.0\.0\.1:1 are"):
            await table.fetch(["a"], LONG_S)
        with pytest.raises(Unavailable, match="Connect call failed"):
            await table.connected(1.5)
        for call in (table.ping(LONG_S), table.read_map("a", LONG_S), table.drop("a", LONG_S)):
            with pytest.raises(Unavailable, match="it is not known where keys"):
                await call


async def test_a_server_that_is_no_cluster_is_told_so(valkey: str) -> None:
    path = valkey.removeprefix("unix://")
    server = await asyncio.start_server(lambda r, w: _joined(r, w, path), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with ClusterTable(f"redis+cluster://127.0.0.1:{port}") as table:
            with pytest.raises(Unavailable, match="cluster support disabled"):
                await table.connected(1.5)


async def test_a_full_node_refuses_writes_and_still_answers(table: ClusterTable, cluster: ValkeyCluster) -> None:
    key = keys_of(cluster, 0, 2)
    await table.load(key[:1], [row(EVENT_US)], LONG_S)
    cluster.ask(cluster.ports[0], "CONFIG", "SET", "maxmemory", 1)
    try:
        for write in (
            table.load(key, [row(EVENT_US)] * 2, LONG_S),
            table.keep_newest(key, [row(EVENT_US)] * 2, [0, 0], LONG_S),
        ):
            with pytest.raises(Refused, match="is full"):
                await write
        assert await table.fetch(key, LONG_S) == [row(EVENT_US), None]
    finally:
        cluster.ask(cluster.ports[0], "CONFIG", "SET", "maxmemory", 0)


async def test_a_url_opens_its_table(cluster: ValkeyCluster, valkey: str) -> None:
    for url, kind in ((cluster.url, ClusterTable), (valkey, ValkeyTable)):
        async with open_table(url) as table:
            assert isinstance(table, kind)
            async with asyncio.timeout(LONG_S):
                while True:
                    try:
                        await table.ping(LONG_S)
                        break
                    except Unavailable:
                        await asyncio.sleep(0.01)


def test_a_cluster_is_named_by_some_of_its_nodes() -> None:
    assert seeds_of("redis+cluster://me:s%40cret@a:1,b:2,c") == [
        Address(host=host, port=port, username="me", password="s@cret")
        for host, port in (("a", 1), ("b", 2), ("c", 6379))
    ]
    (seed,) = seeds_of("rediss+cluster://a:1?ca=/c.pem")
    assert (seed.tls, seed.ca) == (True, "/c.pem")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis+cluster://a:x", "got host 'a:x'"),
        ("redis+cluster://a,,b", "got an empty host"),
        ("redis+cluster://", "got an empty host"),
        ("redis+cluster://a/1", "a cluster has one database"),
        ("redis+clutter://a", "must be unix:///path"),
    ],
)
def test_a_url_of_no_cluster_is_refused_with_what_is_allowed(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_url(url)


def test_the_map_of_slots_is_read_whatever_nodes_know_of_themselves() -> None:
    asked = Node("seed", 7000)
    reply = [[0, 1, [b"a", 1, b"id"], [b"replica", 9, b"id"]], [2, 2, [None, 2, b"id", []]], [3, 4, [b"?", 3, b"id"]]]
    found = owners(reply, asked)
    assert found[:5] == [Node("a", 1), Node("a", 1), Node("seed", 2), None, None]
    assert set(found[5:]) == {None}
    assert len(found) == SLOTS


def test_redirections_are_told_from_other_errors() -> None:
    asked = Node("seed", 7000)
    assert redirection("MOVED 3999 127.0.0.1:6381", asked) == (3999, Node("127.0.0.1", 6381), False)
    assert redirection("ASK 3999 ::1:6381", asked) == (3999, Node("::1", 6381), True)
    assert redirection("MOVED 1 :6381", asked) == (1, Node("seed", 6381), False)
    for told in ("ERR no", "MOVED", "MOVED x a:1", "ASK 1 a", "TRYAGAIN Multiple keys request during rehashing"):
        assert redirection(told, asked) is None


def redirections(cluster: ValkeyCluster) -> int:
    return _statistic(cluster, "errorstat_MOVED:count=")


def map_reads(cluster: ValkeyCluster) -> int:
    alive = [port for at, port in enumerate(cluster.ports) if at != 1]
    return sum(_counted(cluster, port, "cmdstat_cluster|slots:calls=") for port in alive)


def _statistic(cluster: ValkeyCluster, name: str) -> int:
    return sum(_counted(cluster, port, name) for port in cluster.ports)


def _counted(cluster: ValkeyCluster, port: int, name: str) -> int:
    told = cluster.ask(port, "INFO", "everything")
    found = [line for line in told.splitlines() if line.startswith(name)]
    return int(found[0].removeprefix(name).split(",")[0]) if found else 0


async def _joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    """A TCP connection passed on to a Unix socket, until either side ends."""
    back, forth = await asyncio.open_unix_connection(path)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()

    await asyncio.gather(copy(reader, forth), copy(back, writer), return_exceptions=True)
