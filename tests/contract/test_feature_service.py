"""GetFeatures and DescribeViews over real gRPC and a real Valkey, on both transports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.feature.define.schema import ViewSchema
from services.feature.online.packed import EXPIRED, MISSING, NULL, OK
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.mesh.serve import Offer, Server
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc
from tests.conftest import ValkeyProcess

LONG_S = 10.0
EVENT_US = 1_384_000_000_000_000
ROUTE = ViewSchema("route", "route", ("late_28d", "delay_28d"))
WEATHER = ViewSchema("weather", "origin", ("wind", "rain", "snow"), ttl_s=3600.0)


class StoreStatistics(NamedTuple):
    """mgets: served since the start. hits: keys that were read and there."""

    mgets: int
    hits: int


@dataclasses.dataclass
class Running:
    """A feature service, and what a test needs to talk to it and to its store."""

    service: FeatureService
    store: OnlineStore
    admin: Valkey
    stub: feature_pb2_grpc.FeatureServiceAsyncStub
    channel: grpc.aio.Channel

    async def get(self, *views: pb.ViewKeys, timeout_s: float = LONG_S) -> pb.GetFeaturesResponse:
        return await self.stub.GetFeatures(pb.GetFeaturesRequest(views=views), timeout=timeout_s)

    async def store_statistics(self) -> StoreStatistics:
        told = (await self.admin.call("INFO", "everything", timeout_s=LONG_S)).decode()
        mgets = re.search(r"cmdstat_mget:calls=(\d+)", told)
        hits = re.search(r"keyspace_hits:(\d+)", told)
        return StoreStatistics(int(mgets[1]) if mgets else 0, int(hits[1]) if hits else 0)


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def serving(url: str, transport: str, **options: float) -> AsyncIterator[Running]:
    """Serves two views of few rows."""
    folder = Path(tempfile.mkdtemp(prefix="tf"))
    settings = FeatureSettings(
        mesh_file=folder / "tenfold.toml",
        listen=f"unix:{folder}/f.sock",
        instance="feature-0",
        store=url,
        transport=transport,
        **{"store_timeout_s": LONG_S, "refresh_s": 0.05, **options},  # type: ignore[arg-type]
    )
    async with Valkey(url) as valkey, Valkey(url) as admin:
        await admin.connected(LONG_S)
        await fill(OnlineStore(ValkeyTable(admin), "test"))
        store = OnlineStore(ValkeyTable(valkey), "test")
        service = FeatureService(store, settings)
        add = feature_pb2_grpc.add_FeatureServiceServicer_to_server
        server = Server(settings.listen, [Offer(NAME, service, add)], transport)
        await server.start()
        async with service.fresh(), grpc.aio.insecure_channel(settings.listen) as channel:
            await service.ready()
            await server.ready()
            stub = feature_pb2_grpc.FeatureServiceStub(channel)
            yield Running(service, store, admin, stub, channel)
        await server.stop(lame_duck_s=0, grace_s=1)
    shutil.rmtree(folder)


@pytest.fixture
async def running(valkey: str, transport: str) -> AsyncIterator[Running]:
    async with serving(valkey, transport) as running:
        yield running


async def fill(store: OnlineStore) -> None:
    await store.write(ROUTE, ["JFK-LAX", "EWR-ORD"], EVENT_US, np.array([[0.25, 12.0], [0.5, np.nan]]))
    await store.write(WEATHER, ["JFK"], EVENT_US, np.array([[7.0, 0.0, 0.0]]))
    await store.publish([ROUTE, WEATHER], EVENT_US, {"route": 2, "weather": 1})


def values(rows: pb.ViewRows) -> list[list[float]]:
    return np.frombuffer(rows.values, "<f4").reshape(-1, rows.columns).tolist()


def status(rows: pb.ViewRows) -> list[list[int]]:
    return np.frombuffer(rows.status, np.uint8).reshape(-1, rows.columns).tolist()


def keys(view: str, *entity_ids: str, as_of_us: tuple[int, ...] = ()) -> pb.ViewKeys:
    return pb.ViewKeys(view=view, entity_ids=entity_ids, as_of_us=as_of_us)


async def until(met: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LONG_S):
        while True:
            if await met():
                return
            await asyncio.sleep(0.01)


async def until_known(running: Running, view: str) -> None:
    async def known() -> bool:
        answer = await running.stub.DescribeViews(pb.DescribeViewsRequest(), timeout=LONG_S)
        return view in [described.name for described in answer.views]

    await until(known)


async def first_answer(running: Running, *views: pb.ViewKeys) -> pb.GetFeaturesResponse:
    """The first answer that is not UNAVAILABLE."""
    answers: list[pb.GetFeaturesResponse] = []

    async def answered() -> bool:
        try:
            answers.append(await running.get(*views))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        return bool(answers)

    await until(answered)
    return answers[0]


async def test_rows_come_back_in_the_order_asked_with_status_and_age(running: Running) -> None:
    moment = EVENT_US + 60_000_000
    answer = await running.get(
        keys("weather", "JFK", "LGA", as_of_us=(moment, moment)),
        keys("route", "EWR-ORD", "JFK-LAX", "EWR-ORD", as_of_us=(moment, moment + 500_000, moment)),
    )
    weather, route = answer.views
    assert (weather.view, weather.schema_hash, weather.columns) == ("weather", WEATHER.schema_hash, 3)
    assert status(weather) == [[OK] * 3, [MISSING] * 3]
    assert values(weather)[0] == [7.0, 0.0, 0.0]
    assert np.isnan(values(weather)[1]).all()
    assert (route.view, route.schema_hash, route.columns) == ("route", ROUTE.schema_hash, 2)
    assert status(route) == [[OK, NULL], [OK, OK], [OK, NULL]]
    np.testing.assert_array_equal(values(route), [[0.5, np.nan], [0.25, 12.0], [0.5, np.nan]])
    assert np.frombuffer(route.event_us, "<i8").tolist() == [EVENT_US] * 3
    assert np.frombuffer(route.age_s, "<f4").tolist() == [60.0, 60.5, 60.0]
    assert np.frombuffer(weather.event_us, "<i8").tolist() == [EVENT_US, 0]


async def test_a_row_past_its_time_to_live_is_expired_now_and_alive_as_of_then(running: Running) -> None:
    then = await running.get(keys("weather", "JFK", as_of_us=(EVENT_US + 3_599_999_999,)))
    now = await running.get(keys("weather", "JFK"))
    assert status(then.views[0]) == [[OK] * 3]
    assert status(now.views[0]) == [[EXPIRED] * 3]
    assert np.isnan(values(now.views[0])).all()
    age_s = np.frombuffer(now.views[0].age_s, "<f4")[0]
    assert age_s == pytest.approx(time.time() - EVENT_US / 1e6, rel=1e-3)


async def test_views_describe_themselves(running: Running) -> None:
    views = (await running.stub.DescribeViews(pb.DescribeViewsRequest(), timeout=LONG_S)).views
    assert [view.name for view in views] == ["route", "weather"]
    one = (await running.stub.DescribeViews(pb.DescribeViewsRequest(views=["weather"]), timeout=LONG_S)).views
    assert one[0] == pb.ViewDescription(
        name="weather",
        entity="origin",
        columns=["wind", "rain", "snow"],
        schema_hash=WEATHER.schema_hash,
        ttl_s=3600.0,
        watermark_us=EVENT_US,
        rows=1,
    )


BAD_REQUESTS = {
    "no views": (pb.GetFeaturesRequest(), "views", "must hold 1 to 256 views, got 0"),
    "no ids": (
        pb.GetFeaturesRequest(views=[pb.ViewKeys(view="route")]),
        "views[0].entity_ids",
        "must hold at least 1 id, got 0",
    ),
    "an empty id": (
        pb.GetFeaturesRequest(views=[keys("route", "JFK-LAX", "")]),
        "views[0].entity_ids[1]",
        "must have 1 to 256 bytes of UTF-8, got 0 bytes: ''",
    ),
    "a long id": (
        pb.GetFeaturesRequest(views=[keys("route", "ü" * 4000)]),
        "views[0].entity_ids[0]",
        f"must have 1 to 256 bytes of UTF-8, got 8000 bytes: {'ü' * 40!r}",
    ),
    "too many rows": (
        pb.GetFeaturesRequest(views=[keys("route", *["x"] * 4000), keys("weather", *["x"] * 97)]),
        "views",
        "must ask for at most 4096 rows in all, got 4097",
    ),
    "half the times": (
        pb.GetFeaturesRequest(views=[keys("route", "a", "b", as_of_us=(1,))]),
        "views[0].as_of_us",
        "must be empty or hold one time per entity id, 2, got 1",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_is_invalid_argument_with_field_violations(running: Running, case: str) -> None:
    request, field, description = BAD_REQUESTS[case]
    before = await running.store_statistics()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.GetFeatures(request, timeout=LONG_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert description in (caught.value.details() or "")
    details = dict(tuple(caught.value.trailing_metadata() or ()))["grpc-status-details-bin"]
    told = error_details_pb2.BadRequest()
    status_pb2.Status.FromString(details).details[0].Unpack(told)  # type: ignore[arg-type]
    assert [(v.field, v.description) for v in told.field_violations] == [(field, description)]
    assert (await running.store_statistics()).mgets == before.mgets


async def test_an_unknown_view_is_not_found_with_those_that_exist(running: Running) -> None:
    for call in (
        running.get(keys("route", "x"), keys("rout", "x")),
        running.stub.DescribeViews(pb.DescribeViewsRequest(views=["rout"]), timeout=LONG_S),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"'rout' is not published.*: route, weather") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_events_cannot_be_written_here(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in running.stub.WriteEvents(iter([pb.WriteEventsRequest(source="flights")]), timeout=LONG_S):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_concurrent_calls_share_reads_of_the_store_and_read_no_key_twice(
    valkey_process: ValkeyProcess, transport: str
) -> None:
    async with serving(valkey_process.url, transport, max_batch=64, max_in_flight=1, refresh_s=LONG_S) as running:
        before = await running.store_statistics()
        valkey_process.freeze()
        calls = [
            asyncio.ensure_future(running.get(keys("route", "JFK-LAX", f"e{i}"), keys("weather", "JFK")))
            for i in range(200)
        ]
        reads = running.service.reads

        async def all_arrived() -> bool:
            return len(reads) + reads.members == 200

        await until(all_arrived)
        valkey_process.thaw()
        answers = await asyncio.gather(*calls)
        after = await running.store_statistics()
    assert {str(status(answer.views[0])) for answer in answers} == {str([[OK, OK], [MISSING, MISSING]])}
    batches = reads.batches
    assert batches <= 1 + math.ceil(199 / 64)  # the first may have left with one member
    assert after.mgets - before.mgets == batches
    assert after.hits - before.hits == 2 * batches  # JFK-LAX and JFK once in each


async def test_a_view_published_later_becomes_known_by_itself(running: Running) -> None:
    later = ViewSchema("later", "entity", ("a",))
    await running.store.write(later, ["x"], EVENT_US, np.array([[5.0]]))
    await running.store.publish([later], EVENT_US, {"later": 1})
    await until_known(running, "later")
    assert values((await running.get(keys("later", "x"))).views[0]) == [[5.0]]


async def test_a_changed_schema_is_honest_at_every_step(running: Running) -> None:
    old = (await running.get(keys("route", "JFK-LAX"))).views[0]
    wider = ViewSchema("route", "route", ("late_28d", "delay_28d", "flights_28d"))
    await running.store.write(wider, ["JFK-LAX"], EVENT_US, np.array([[1.0, 2.0, 3.0]]))
    # written and not yet published: nobody can tell what the row means
    between = (await running.get(keys("route", "JFK-LAX", "EWR-ORD"))).views[0]
    assert (between.schema_hash, status(between)) == (ROUTE.schema_hash, [[MISSING, MISSING], [OK, NULL]])
    await running.store.publish([wider], EVENT_US, {"route": 1})
    async with asyncio.timeout(LONG_S):
        while (new := (await running.get(keys("route", "JFK-LAX", "EWR-ORD"))).views[0]).columns == old.columns:
            assert status(new)[0] == [MISSING, MISSING]
            await asyncio.sleep(0.01)
    assert (new.schema_hash, values(new)[0]) == (wider.schema_hash, [1.0, 2.0, 3.0])
    assert status(new) == [[OK] * 3, [MISSING] * 3]


async def test_a_reader_whose_generation_is_gone_finds_the_new_one_by_itself(valkey: str, transport: str) -> None:
    async with serving(valkey, transport, refresh_s=LONG_S) as running:
        for value in (1.0, 2.0):
            number = await running.store.begin(ROUTE)
            await running.store.load(ROUTE, number, ["JFK-LAX"], EVENT_US, np.full((1, 2), value))
            done = await running.store.publish([ROUTE], EVENT_US, {"route": 1}, {"route": number})
            assert await running.store.retire("route", done.replaced["route"], grace_s=0.0) > 0
            async with asyncio.timeout(LONG_S):  # what is published is read again at most once a second
                while status(rows := (await running.get(keys("route", "JFK-LAX"))).views[0]) != [[OK, OK]]:
                    assert status(rows) == [[MISSING, MISSING]]
            assert values(rows) == [[value, value]]


async def test_a_damaged_row_is_missing_counted_and_told_once(running: Running, caplog) -> None:
    await running.admin.call("SETRANGE", "tf:test:route:{JFK-LAX}", 30, "damage", timeout_s=LONG_S)
    await running.admin.call("SET", "tf:test:route:{EWR-ORD}", "x" * 2**20, timeout_s=LONG_S)
    for _ in range(2):
        rows = (await running.get(keys("route", "JFK-LAX", "EWR-ORD"))).views[0]
        assert status(rows) == [[MISSING] * 2] * 2
    assert running.service.unreadable_rows == 4
    assert [record.view for record in caplog.records if record.levelname == "ERROR"] == ["route"]


async def test_a_killed_store_is_unavailable_at_once_and_comes_back(
    valkey_process: ValkeyProcess, transport: str
) -> None:
    async with serving(valkey_process.url, transport) as running:
        outcomes: list[grpc.StatusCode] = []
        answered, enough, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def keep_calling() -> None:
            while not stop.is_set():
                try:
                    # without a deadline: an answer must come anyway
                    await running.stub.GetFeatures(pb.GetFeaturesRequest(views=[keys("route", "JFK-LAX")]))
                    outcomes.append(grpc.StatusCode.OK)
                    answered.set()
                except grpc.aio.AioRpcError as error:
                    outcomes.append(error.code())
                if outcomes.count(grpc.StatusCode.UNAVAILABLE) >= 50:
                    enough.set()

        async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as callers:
            for _ in range(8):
                callers.create_task(keep_calling())
            await answered.wait()
            valkey_process.kill()
            await enough.wait()
            stop.set()
        assert set(outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        health = health_pb2_grpc.HealthStub(running.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(service=NAME))).status == 1  # SERVING

        valkey_process.start()  # empty: what rows mean is still known, the rows are gone
        answer = await first_answer(running, keys("route", "JFK-LAX"))
        assert status(answer.views[0]) == [[MISSING, MISSING]]
        await running.admin.connected(LONG_S)
        await fill(running.store)
        assert values((await running.get(keys("route", "JFK-LAX"))).views[0]) == [[0.25, 12.0]]


async def test_a_frozen_store_costs_the_caller_its_deadline_and_no_more(
    valkey_process: ValkeyProcess, transport: str
) -> None:
    async with serving(valkey_process.url, transport, refresh_s=LONG_S) as running:
        valkey_process.freeze()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.get(keys("route", "JFK-LAX"), timeout_s=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        valkey_process.thaw()
        answer = await first_answer(running, keys("route", "JFK-LAX"))
        assert values(answer.views[0]) == [[0.25, 12.0]]


async def test_a_caller_without_deadline_waits_no_longer_than_the_store_may_take(
    valkey_process, transport: str
) -> None:
    async with serving(valkey_process.url, transport, store_timeout_s=0.1, refresh_s=LONG_S) as running:
        valkey_process.freeze()
        with pytest.raises(grpc.aio.AioRpcError, match="did not answer within 100 ms") as caught:
            await running.stub.GetFeatures(pb.GetFeaturesRequest(views=[keys("route", "JFK-LAX")]))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_more_bytes_than_a_message_holds_are_refused(running: Running) -> None:
    broad = ViewSchema("broad", "entity", tuple(f"c{i}" for i in range(1000)))
    await running.store.publish([broad], EVENT_US, {"broad": 0})
    await until_known(running, "broad")
    with pytest.raises(grpc.aio.AioRpcError, match="must ask for at most 8388608 bytes of rows in all, got") as caught:
        await running.get(keys("broad", *["x"] * 2000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
