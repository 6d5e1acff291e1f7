"""What was acknowledged counts once, whoever is killed and whenever."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.stream.applier import Applier, StreamView
from services.feature.stream.log import EventLog, Group, Logged
from services.feature.stream.states import StateStore
from services.feature.tiles.kernel import ViewKernel
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc
from tests.conftest import ValkeyProcess
from tests.contract.streamed import (
    CUSTOMER,
    DEFINITIONS,
    LONG_S,
    MESH,
    NOW_US,
    SHOP,
    build,
    eventually,
    order,
    request,
    serving,
)

ROOT = Path(__file__).parents[2]
SHOPS = [f"shop-{n}" for n in range(12)]
KILLS = 5


def shop_of(sequence: int) -> str:
    return SHOPS[sequence * 7 % len(SHOPS)]


def amount_of(sequence: int) -> float:
    """Whole numbers: their sums are exact."""
    return float(sequence * 31 % 97)


@dataclass
class Producer:
    """Sends numbered orders, a few of them again, until it has an answer for each."""

    address: str
    chance: random.Random
    sent: int = 0
    acknowledged: set[int] = field(default_factory=set)
    unsure: list[list[int]] = field(default_factory=list)
    endings: int = 0

    async def keep_sending(self, enough: asyncio.Event) -> None:
        """Until told that it is enough and everything was acknowledged."""
        while not enough.is_set() or self.unsure:
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(self.address, options=options) as channel:
                stub = feature_pb2_grpc.FeatureServiceStub(channel)
                try:
                    await self._one_stream(stub, enough)
                except grpc.aio.AioRpcError as error:
                    # grpc.aio's client calls it INTERNAL where the stream ended while it was handing over a message
                    sending = "SendMessageOperation" in error.debug_error_string()
                    if error.code() is not grpc.StatusCode.UNAVAILABLE and not sending:
                        raise
                    self.endings += 1
                    await asyncio.sleep(0.05)

    async def _one_stream(self, stub: feature_pb2_grpc.FeatureServiceAsyncStub, enough: asyncio.Event) -> None:
        under_way: list[list[int]] = []
        again, self.unsure = self.unsure, []
        over = False

        async def requests() -> AsyncIterator[pb.WriteEventsRequest]:
            for numbers in again:
                if over:
                    return
                under_way.append(numbers)
                yield self._request(numbers)
            # a stream that has ended may go on asking for requests: none of those would ever be accounted for
            while not over and not enough.is_set() and len(under_way) < 400:
                fresh = list(range(self.sent + 1, self.sent + 1 + self.chance.randrange(1, 20)))
                self.sent = fresh[-1]
                old = self.chance.sample(range(1, self.sent), min(3, self.sent - 1))
                numbers = fresh + old
                self.chance.shuffle(numbers)
                under_way.append(numbers)
                yield self._request(numbers)
                await asyncio.sleep(0)

        answered = 0
        try:
            async for answer in stub.WriteEvents(requests(), timeout=LONG_S):
                assert answer.acknowledged_sequence == max(under_way[answered])
                self.acknowledged.update(under_way[answered])
                answered += 1
        finally:
            over = True
            self.unsure = under_way[answered:] + again[len(under_way) :]

    def _request(self, numbers: Sequence[int]) -> pb.WriteEventsRequest:
        return request(*(order(n, shop_of(n), amount_of(n), NOW_US + n) for n in numbers))


@contextlib.asynccontextmanager
async def feature_process(folder: Path, store: str, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    mesh_file = folder / "tenfold.toml"
    text = (ROOT / "deploy" / "flights" / "tenfold.toml").read_text()
    text = text.replace('name = "flights"', f'name = "{MESH}"', 1)
    mesh_file.write_text(text.replace('"deploy.flights.views"', '"tests.contract.streamed"'))
    environ = {
        "TENFOLD_MESH_FILE": str(mesh_file),
        "TENFOLD_LISTEN": f"unix:{folder}/{name}.sock",
        "TENFOLD_INSTANCE": name,
        "TENFOLD_STORE": store,
        "TENFOLD_DIE_WITH_PARENT": "1",
        "TENFOLD_LAME_DUCK_S": "0",
        "TENFOLD_LEASE_S": "0.5",
    }
    with (folder / f"{name}.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.feature", cwd=ROOT, env=environ, stderr=output
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def all_counted(url: str) -> None:
    async with Valkey(url) as client:
        await client.connected(LONG_S)
        log = EventLog(client, MESH)
        streams = [StreamView(view, ViewKernel(view)) for view in DEFINITIONS.views]
        applier = Applier(streams, OnlineStore(ValkeyTable(client), MESH), log, log, StateStore(client, MESH))

        async def is_counted() -> bool:
            return not (await applier.lag())["orders"].events

        await eventually(is_counted)


async def check_exact(url: str, last: int) -> None:
    """Every order up to `last` counts once, in both views."""
    counts = Counter(shop_of(n) for n in range(1, last + 1))
    sums = Counter(dict.fromkeys(SHOPS, 0.0))
    for n in range(1, last + 1):
        sums[shop_of(n)] += amount_of(n)
    async with serving(url, apply=False) as served:
        found = await served.values("shop", SHOPS, NOW_US + last + 1)
        assert found["orders_count"] == [float(counts[shop]) for shop in SHOPS]
        assert found["amount_sum"] == [sums[shop] for shop in SHOPS]
        assert found["amount_last"] == [
            amount_of(max(n for n in range(1, last + 1) if shop_of(n) == shop)) for shop in SHOPS
        ]
        assert (await served.values("customer", ["c"], NOW_US + last + 1))["orders_count"] == [float(last)]


@pytest.mark.parametrize("victim", ["service", "store"])
async def test_killed_at_any_moment_nothing_is_lost_and_nothing_counts_twice(
    victim: str, durable_valkey: ValkeyProcess, folder: Path
) -> None:
    chance = random.Random(11)
    await build(durable_valkey.url, folder)
    producer = Producer(f"unix:{folder}/f.sock", chance)
    enough = asyncio.Event()
    sending = asyncio.create_task(producer.keep_sending(enough))
    for kill in range(KILLS + 1):
        async with contextlib.AsyncExitStack() as stack:
            process = await stack.enter_async_context(feature_process(folder, durable_valkey.url, "f"))
            before = len(producer.acknowledged)

            async def goes_on(before: int = before) -> bool:
                return len(producer.acknowledged) > before or sending.done()

            await eventually(goes_on)
            await asyncio.sleep(chance.uniform(0.0, 0.6))
            if kill == KILLS:
                enough.set()
                await asyncio.wait_for(sending, LONG_S)
                await all_counted(durable_valkey.url)
            elif victim == "service":
                process.kill()
            else:
                durable_valkey.kill()
                durable_valkey.start()
    assert producer.acknowledged == set(range(1, producer.sent + 1))
    assert producer.endings >= KILLS
    await check_exact(durable_valkey.url, producer.sent)


class Unleased(StateStore):
    """Everybody has the lease."""

    async def lease(self, owner: str, for_s: float, timeout_s: float) -> bool:
        return True


async def test_appliers_that_work_at_once_count_everything_once(durable_valkey: ValkeyProcess, folder: Path) -> None:
    last = 2_000
    url = durable_valkey.url
    await build(url, folder)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Valkey(url)) for _ in range(7)]
        await asyncio.gather(*(client.connected(LONG_S) for client in clients))
        appliers = [
            Applier(
                [StreamView(view, ViewKernel(view)) for view in (SHOP, CUSTOMER)],
                OnlineStore(ValkeyTable(clients[at]), MESH),
                EventLog(clients[at], MESH),
                EventLog(clients[at + 3], MESH),
                Unleased(clients[at], MESH),
                batch=batch,
            )
            for at, batch in enumerate((64, 50, 7))
        ]
        running = [asyncio.create_task(applier.run()) for applier in appliers]
        log = EventLog(clients[6], MESH)
        for start in range(1, last, 40):
            events = [logged(n) for n in range(start, start + 40)]
            await log.append("orders", [Group(events)], LONG_S)
        await all_counted(url)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert sum(applier.applied for applier in appliers) > last  # they did read the same
        assert sum(applier.retried for applier in appliers) > 0  # and got into each other's way
    await check_exact(url, last)


def logged(n: int) -> Logged:
    known_us = NOW_US + n
    return Logged(n, known_us - 1, known_us, {"shop": shop_of(n), "customer": "c"}, {}, {"amount": amount_of(n)})


async def test_another_takes_over_where_one_died(durable_valkey: ValkeyProcess, folder: Path) -> None:
    await build(durable_valkey.url, folder)
    async with (
        feature_process(folder, durable_valkey.url, "f") as first,
        feature_process(folder, durable_valkey.url, "g"),
    ):
        enough = asyncio.Event()
        producer = Producer(f"unix:{folder}/g.sock", random.Random(3))
        sending = asyncio.create_task(producer.keep_sending(enough))

        async def some() -> bool:
            return len(producer.acknowledged) > 100

        await eventually(some)
        first.kill()
        await asyncio.sleep(0.2)
        enough.set()
        await asyncio.wait_for(sending, LONG_S)
        await all_counted(durable_valkey.url)
    await check_exact(durable_valkey.url, producer.sent)


async def test_a_store_that_starts_again_gives_back_its_states(durable_valkey: ValkeyProcess, folder: Path) -> None:
    await build(durable_valkey.url, folder)
    async with serving(durable_valkey.url) as served:
        await served.write(request(order(1, "a", 2.0), order(2, "a", 3.0)))
        await served.caught_up()
        durable_valkey.kill()
        durable_valkey.start()

        async def is_back() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                rows = await served.rows("shop", ["a"], NOW_US + 1)
                return bool(np.frombuffer(rows.values, "<f4")[0] == 2.0)
            return False

        await eventually(is_back)
