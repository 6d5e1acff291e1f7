"""Events from WriteEvents to GetFeatures: real gRPC, a real Valkey that keeps an append-only file."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.feature.online.packed import EXPIRED, MISSING, NULL, OK
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.stream.states import StateStore
from tenfold.feature.v1 import feature_pb2 as pb
from tests.conftest import ValkeyProcess
from tests.contract.streamed import (
    HOUR_US,
    LONG_S,
    MESH,
    NOW_US,
    SHOP,
    Serving,
    build,
    eventually,
    order,
    request,
    serving,
)


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def served(durable_valkey: ValkeyProcess, transport: str, folder: Path) -> AsyncIterator[Serving]:
    await build(durable_valkey.url, folder)
    async with serving(durable_valkey.url, transport) as served:
        yield served


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """Field -> what was wrong with it."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = error.trailing_metadata()["grpc-status-details-bin"]  # type: ignore[index]
    status = status_pb2.Status.FromString(details)  # type: ignore[arg-type]
    told = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(told)
    return {one.field: one.description for one in told.field_violations}


async def test_what_is_written_is_read(served: Serving) -> None:
    answers = await served.write(
        request(order(1, "a", 5.0), order(2, "b", 7.0)), request(order(3, "a", 2.5, NOW_US + 10), order(1, "a", 5.0))
    )
    assert [(a.source, a.acknowledged_sequence, a.accepted, a.duplicates) for a in answers] == [
        ("orders", 2, 2, 0),
        ("orders", 3, 1, 1),
    ]
    await served.caught_up()
    found = await served.values("shop", ["a", "b", "nobody"], NOW_US + 20)
    assert found["orders_count"] == [2.0, 1.0, pytest.approx(math.nan, nan_ok=True)]
    assert found["amount_sum_1h"][:2] == [7.5, 7.0]
    assert found["amount_last"][:2] == [2.5, 7.0]
    rows = await served.rows("shop", ["a", "nobody"], NOW_US + 20)
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [NOW_US + 10, 0]
    assert np.frombuffer(rows.status, np.uint8).reshape(2, -1)[:, 0].tolist() == [OK, MISSING]
    assert (await served.values("customer", ["c"], NOW_US + 20))["orders_count"] == [3.0]


async def test_windows_end_without_events_and_rows_grow_old(served: Serving) -> None:
    await served.write(request(order(1, "a", 5.0)))
    await served.caught_up()
    later = await served.values("shop", ["a"], NOW_US + 2 * HOUR_US)
    assert (later["orders_count_1h"], later["orders_count"], later["amount_sum_1h"]) == ([0.0], [1.0], [0.0])
    rows = await served.rows("shop", ["a"], NOW_US + 2 * HOUR_US)
    assert np.frombuffer(rows.age_s, "<f4").tolist() == [7200.0]
    status = dict(zip(later, np.frombuffer(rows.status, np.uint8).tolist(), strict=True))
    assert (status["amount_max_1h"], status["amount_max"]) == (NULL, OK)
    old = await served.rows("shop", ["a"], NOW_US + 25 * HOUR_US)
    assert set(old.status) == {EXPIRED}


async def test_a_promise_keeps_a_row_young(served: Serving) -> None:
    await served.write(request(order(1, "a")))
    (answer,) = await served.write(request(watermark_us=NOW_US + 24 * HOUR_US))
    assert (answer.accepted, answer.acknowledged_sequence) == (0, 0)

    async def is_young() -> bool:
        rows = await served.rows("shop", ["a"], NOW_US + 25 * HOUR_US)
        return bool(np.frombuffer(rows.age_s, "<f4")[0] == 3600.0)

    await eventually(is_young)
    rows = await served.rows("shop", ["a", "nobody"], NOW_US + 25 * HOUR_US)
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [NOW_US + 24 * HOUR_US, 0]
    assert rows.status[0] == OK


async def test_late_and_unordered_events_count_where_they_belong(served: Serving) -> None:
    late = [order(9, "a", 4.0, NOW_US), order(2, "a", 1.0, NOW_US - HOUR_US), order(5, "a", 2.0, NOW_US - 60_000_000)]
    for event in late:
        await served.write(request(event))
        await served.caught_up()
    found = await served.values("shop", ["a"], NOW_US + 1)
    assert (found["orders_count"], found["amount_last"], found["amount_sum"]) == ([3.0], [4.0], [7.0])
    assert found["amount_sum_1h"] == [7.0]  # a window reaches back to the step before its end
    assert (await served.values("shop", ["a"], NOW_US + HOUR_US // 2))["amount_sum_1h"] == [6.0]


async def test_a_null_amount_and_a_nan_are_kept_apart(served: Serving) -> None:
    await served.write(request(order(1, "a", None), order(2, "b", math.nan)))
    await served.caught_up()
    rows = await served.rows("shop", ["a", "b"], NOW_US + 1)
    at = 6  # amount_last
    assert np.frombuffer(rows.status, np.uint8).reshape(2, -1)[:, at].tolist() == [NULL, OK]


@pytest.mark.parametrize(
    ("sent", "field", "told"),
    [
        (pb.WriteEventsRequest(source="offers", events=[order(1)]), "source", "must be one of orders, got 'offers'"),
        (request(order(0)), "events[0].sequence", "must be 1 to 2^63 - 1, got 0"),
        (request(order(1), order(2**63)), "events[1].sequence", "must be 1 to 2^63 - 1, got 9223372036854775808"),
        (request(order(1, known_us=1)), "events[0].event_us", "must be 1 to 2^53 microseconds since 1970, got 0"),
        (request(pb.Event(sequence=1, event_us=5, known_us=4)), "events[0].known_us", "must not be before event_us 5"),
        (request(order(1, known_us=2**53 + 1)), "events[0].known_us", "not far in the server's future, got"),
        (request(pb.Event(sequence=1, event_us=5, known_us=5)), "events[0].entities", "at least one of customer, shop"),
        (request(order(1, shop="")), "events[0].entities['shop']", "must have 1 to 256 bytes of UTF-8, got 0: ''"),
        (request(order(1, shop="ü" * 129)), "events[0].entities['shop']", "must have 1 to 256 bytes of UTF-8, got 258"),
        (request(order(1, kind="x" * 257)), "events[0].labels['kind']", "must have 0 to 256 bytes"),
        (request(pb.Event(sequence=1, event_us=5, known_us=5, entities={"town": "x"})), "events[0].entities", "'town'"),
        (request(pb.Event(sequence=1, event_us=5, known_us=5, values={"tax": 1})), "events[0].values", "has amount"),
        (request(pb.Event(sequence=1, event_us=5, known_us=5, labels={"tax": ""})), "events[0].labels", "has kind"),
        (request(watermark_us=-1), "watermark_us", "must be 0 or up to"),
        (request(watermark_us=2**60), "watermark_us", "must be 0 or up to"),
        (request(*(order(n) for n in range(1, 1026))), "events", "must hold at most 1024 events, got 1025"),
    ],
)
async def test_an_event_that_cannot_be_is_refused_and_nothing_of_its_request_counts(
    served: Serving, sent: pb.WriteEventsRequest, field: str, told: str
) -> None:
    good = order(77, "good")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.write(request(order(78, "before")), sent)
    assert told in violations(raised.value)[field]
    if sent.source == "orders" and len(sent.events) < 1024:
        both = pb.WriteEventsRequest(source="orders", events=[good, *sent.events], watermark_us=sent.watermark_us)
        with pytest.raises(grpc.aio.AioRpcError):
            await served.write(both)
    (answer,) = await served.write(request(good, order(78, "before")))
    assert (answer.accepted, answer.duplicates) == (1, 1)


async def test_events_of_the_far_future_are_for_replays(durable_valkey: ValkeyProcess, folder: Path) -> None:
    far_us = time.time_ns() // 1000 + 10 * HOUR_US
    async with serving(durable_valkey.url) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.write(request(order(1, known_us=far_us)))
        assert "server's future" in violations(raised.value)["events[0].known_us"]
    async with serving(durable_valkey.url, replay=True) as served:
        assert (await served.write(request(order(1, known_us=far_us))))[0].accepted == 1


async def test_bytes_that_are_no_request_end_the_stream_with_invalid_argument(served: Serving) -> None:
    async with grpc.aio.insecure_channel(served.settings.listen) as channel:
        method = channel.stream_stream("/tenfold.feature.v1.FeatureService/WriteEvents")

        async def requests() -> AsyncIterator[bytes]:
            yield request(order(1)).SerializeToString()
            yield b"\xff\xff\xff"

        call = method(requests(), timeout=LONG_S)
        assert pb.WriteEventsResponse.FromString(await call.read()).accepted == 1
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_full_log_is_told_with_its_reason(durable_valkey: ValkeyProcess) -> None:
    async with serving(durable_valkey.url, max_log_events=3) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.write(request(order(1), order(2)), request(order(3), order(4)), request(order(5)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the log of source 'orders' is full: it holds 2 events and may hold 3" in (raised.value.details() or "")
        answers = await served.write(request(order(1), order(2)), request(order(3)))
        assert [(a.accepted, a.duplicates) for a in answers] == [(0, 2), (1, 0)]


async def test_a_store_that_would_forget_takes_no_events_unless_told_to(valkey: str, folder: Path) -> None:
    async with serving(valkey) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.write(request(order(1)))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "must run with appendonly yes, got 'no'" in (raised.value.details() or "")
    async with serving(valkey, events_durability="memory") as served:
        assert (await served.write(request(order(1))))[0].accepted == 1


async def test_without_its_store_it_is_unavailable_and_goes_on_when_it_is_back(
    served: Serving, durable_valkey: ValkeyProcess
) -> None:
    await served.write(request(order(1, "a")))
    durable_valkey.kill()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.write(request(order(2, "a")))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    durable_valkey.start()
    await eventually(lambda: took(served, request(order(1, "a"), order(2, "a")), (1, 1)))
    await eventually(lambda: counts(served, "a", 2.0))


async def took(served: Serving, one: pb.WriteEventsRequest, accepted_and_duplicates: tuple[int, int]) -> bool:
    """False while the service says that it is unavailable."""
    try:
        (answer,) = await served.write(one)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    assert (answer.accepted, answer.duplicates) == accepted_and_duplicates
    return True


async def counts(served: Serving, shop: str, orders: float) -> bool:
    return (await served.values("shop", [shop], NOW_US + 1))["orders_count"] == [orders]


async def test_a_damaged_state_is_missing_rather_than_wrong_until_its_view_is_built_again(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    generation = (await build(durable_valkey.url, folder))["shop"].generation
    async with serving(durable_valkey.url) as served, Valkey(durable_valkey.url) as client:
        await client.connected(LONG_S)
        await served.write(request(order(1, "a"), order(2, "b")))
        await served.caught_up()
        key = OnlineStore(ValkeyTable(client), MESH).key_prefix("shop", generation) + "a}"
        assert await client.call("EXISTS", key, timeout_s=LONG_S)
        await client.call("SETRANGE", key, 50, b"\xff\xff", timeout_s=LONG_S)
        await served.write(request(order(3, "a"), order(4, "b")))
        await served.caught_up()
        rows = await served.rows("shop", ["a", "b"], NOW_US + 1)
        assert np.frombuffer(rows.status, np.uint8).reshape(2, -1)[:, 0].tolist() == [MISSING, OK]
        assert served.streams.applier.unreadable == 1
        await build(durable_valkey.url, folder)
        await eventually(lambda: counts(served, "a", 2.0))
        assert await counts(served, "b", 2.0)


async def test_an_entry_that_cannot_be_decoded_is_skipped_and_counted(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    await build(durable_valkey.url, folder)
    async with serving(durable_valkey.url, apply=False) as served, Valkey(durable_valkey.url) as client:
        await client.connected(LONG_S)
        await served.write(request(order(1, "a")))
        await client.call("INCR", f"tf:{MESH}:position:orders", timeout_s=LONG_S)
        await client.call("XADD", f"tf:{MESH}:log:orders", "2-0", "e", b"\x01poison", timeout_s=LONG_S)
        await served.write(request(order(2, "a")))
        assert (await served.streams.applier.lag())["orders"][:2] == (3, 3)
        running = asyncio.create_task(served.streams.applier.run())
        await served.caught_up()
        running.cancel()
        assert await counts(served, "a", 2.0)
        assert (served.streams.applier.poisonous, served.streams.applier.applied) == (1, 2)
        lag = (await served.streams.applier.lag())["orders"]
        assert (lag.events, lag.waiting, lag.known_us, lag.watermark_us) == (0, 3, NOW_US, 0)


async def test_events_wait_in_the_log_for_a_view_that_is_not_built_yet(
    durable_valkey: ValkeyProcess, folder: Path
) -> None:
    async with serving(durable_valkey.url) as served:
        await served.write(request(order(1, "a"), order(2, "a")))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.rows("shop", ["a"])
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        await build(durable_valkey.url, folder)
        await eventually(lambda: known(served))
        assert await counts(served, "a", 2.0)


async def known(served: Serving) -> bool:
    try:
        await served.rows("shop", ["a"])
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


async def test_states_of_another_definition_are_left_alone(durable_valkey: ValkeyProcess, folder: Path) -> None:
    features = (replace(one, resolution="1m") if one.window and one.step_us else one for one in SHOP.features)
    changed = replace(SHOP, features=tuple(features))
    assert changed.columns == SHOP.columns
    assert changed != SHOP
    await build(durable_valkey.url, folder, [changed])
    async with serving(durable_valkey.url) as served, Valkey(durable_valkey.url) as client:
        await client.connected(LONG_S)
        await served.write(request(order(1, "a")))
        await asyncio.sleep(1.0)  # as long as an applier takes to look at what is published
        applied = await StateStore(client, MESH).applied("orders", LONG_S)
        assert set(applied.positions.values()) == {0}
        await build(durable_valkey.url, folder)
        await eventually(lambda: counts(served, "a", 1.0))
