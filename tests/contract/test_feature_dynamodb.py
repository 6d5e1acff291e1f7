"""The DynamoDB table against an emulator, and against one that throttles, stalls or is gone."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from aiobotocore.session import get_session

from services.feature.online.dynamodb import MAX_COMPARED, MAX_FIELDS, MAX_ITEM_BYTES, DynamoTable
from services.feature.online.packed import RowLayout
from services.feature.online.store import OnlineStore
from services.feature.online.table import Table
from services.resilience.errors import DeadlineExceeded, Reason, Refused, Unavailable
from tests.contract.dynamo_server import Body, Forward, Throttled, emulator, in_front_of
from tests.contract.table_contract import CHECKS, EVENT_US, LONG_S, SCHEMA, Check, keep, row

_numbers = itertools.count()


@pytest.fixture(scope="module")
def dynamodb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a running DynamoDB."""
    with emulator(tmp_path_factory.mktemp("dynamodb") / "log") as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nobody; and whatever this machine is configured with stays out of it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_DYNAMODB"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def name() -> str:
    """Of a table that no other test has."""
    return f"features{next(_numbers)}"


@pytest.fixture
async def table(dynamodb: str, name: str) -> AsyncIterator[DynamoTable]:
    async with DynamoTable.open(url_of(dynamodb, name)) as opened:
        yield opened


def url_of(endpoint: str, name: str, options: str = "&create=true") -> str:
    return f"dynamodb://eu-west-1/{name}?endpoint={endpoint}{options}"


class Meddler:
    """Counts calls of each operation.

    throttles: calls of an operation that are refused, numbered from 1.
    leaves: how many keys or items of a larger batch stay undone. starves: all of every batch do.
    """

    def __init__(self, throttles: dict[str, set[int]] | None = None, *, leaves: int = 0, starves: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self._throttles, self._leaves, self._starves = throttles or {}, leaves, starves

    async def __call__(self, operation: str, body: Body, forward: Forward) -> Body:
        self.calls[operation] += 1
        self.bodies.append(body)
        if self.calls[operation] in self._throttles.get(operation, ()):
            raise Throttled
        if operation == "BatchGetItem":
            ((name, asked),) = body["RequestItems"].items()
            done, left = self._split(asked["Keys"])
            reply = await forward({"RequestItems": {name: {**asked, "Keys": done}}}) if done else {"Responses": {}}
            return {**reply, "UnprocessedKeys": {name: {**asked, "Keys": left}} if left else {}}
        if operation == "BatchWriteItem":
            ((name, asked),) = body["RequestItems"].items()
            done, left = self._split(asked)
            reply = await forward({"RequestItems": {name: done}}) if done else {}
            return {**reply, "UnprocessedItems": {name: left} if left else {}}
        return await forward(body)

    def _split(self, things: list[Body]) -> tuple[list[Body], list[Body]]:
        """What is done, and what is not."""
        if self._starves:
            return [], things
        done = len(things) - self._leaves if len(things) > self._leaves else len(things)
        return things[:done], things[done:]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_it_is_a_table(check: Check, table: Table) -> None:
    await check(table)


async def test_two_processes_worth_of_writers_lose_nothing(dynamodb: str, name: str) -> None:
    async with (
        DynamoTable.open(url_of(dynamodb, name)) as one,
        DynamoTable.open(url_of(dynamodb, name)) as two,
    ):
        tables = itertools.cycle([one, two])
        counts = await asyncio.gather(*(keep(next(tables), "a", row(EVENT_US + i * 7 % 31)) for i in range(31)))
        assert await two.fetch(["a"], LONG_S) == [row(EVENT_US + 30)]
        assert 1 <= sum(counts) <= 31


async def test_a_table_is_made_once_with_its_expiry_and_used_as_it_is_after(dynamodb: str, name: str) -> None:
    async with DynamoTable.open(url_of(dynamodb, name)) as table:
        await keep(table, "a", row(EVENT_US))
    async with DynamoTable.open(url_of(dynamodb, name)) as table:
        assert await table.fetch(["a"], LONG_S) == [row(EVENT_US)]
    async with get_session().create_client("dynamodb", region_name="eu-west-1", endpoint_url=dynamodb) as client:
        ttl = (await client.describe_time_to_live(TableName=name))["TimeToLiveDescription"]
        assert ttl == {"TimeToLiveStatus": "ENABLED", "AttributeName": "expires"}


async def test_a_table_with_other_keys_is_refused(dynamodb: str, name: str) -> None:
    async with get_session().create_client("dynamodb", region_name="eu-west-1", endpoint_url=dynamodb) as client:
        await client.create_table(
            TableName=name,
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            BillingMode="PAY_PER_REQUEST",
        )
    with pytest.raises(ValueError, match=r"must have the partition key 'key' of type S alone, got .*id"):
        async with DynamoTable.open(url_of(dynamodb, name)):
            pass
    async with DynamoTable.open(url_of(dynamodb, name, "")) as table:
        with pytest.raises(Unavailable, match="ValidationException"):
            await table.ping(LONG_S)


async def test_the_server_sees_expiries_in_seconds_rounded_up(dynamodb: str, name: str, table: DynamoTable) -> None:
    await table.keep_newest(["a", "b"], [row(EVENT_US)] * 2, [4_000_000_000_001, 0], LONG_S)
    async with get_session().create_client("dynamodb", region_name="eu-west-1", endpoint_url=dynamodb) as client:
        a, b = [(await client.get_item(TableName=name, Key={"key": {"S": key}}))["Item"] for key in "ab"]
    assert a["expires"] == {"N": "4000000001"}
    assert "expires" not in b
    assert a["event_us"] == {"N": str(EVENT_US)}


async def test_reads_are_eventually_consistent_unless_asked_otherwise(dynamodb: str, name: str) -> None:
    meddler = Meddler()
    async with in_front_of(dynamodb, meddler) as endpoint:
        for options, consistent in (("&create=true", False), ("&consistent=true", True)):
            async with DynamoTable.open(url_of(endpoint, name, options)) as table:
                await table.fetch(["a"], LONG_S)
                assert meddler.bodies[-1]["RequestItems"][name]["ConsistentRead"] is consistent


async def test_a_read_asks_once_for_each_key_in_calls_of_a_hundred(dynamodb: str, name: str) -> None:
    meddler = Meddler()
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        meddler.bodies.clear()
        await table.fetch([f"k{i}" for i in range(250)] * 3, LONG_S)
        assert sorted(len(body["RequestItems"][name]["Keys"]) for body in meddler.bodies) == [50, 100, 100]


async def test_keys_that_cannot_exist_are_missing_and_do_not_spoil_the_others(table: DynamoTable) -> None:
    await keep(table, "a", row(EVENT_US))
    assert await table.fetch(["", "a", "x" * 2049, "é" * 1025], LONG_S) == [None, row(EVENT_US), None, None]


async def test_a_throttled_read_is_refused_at_once_and_the_next_succeeds(dynamodb: str, name: str) -> None:
    meddler = Meddler({"BatchGetItem": {2}})
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        await keep(table, "a", row(EVENT_US))
        assert await table.fetch(["a"], LONG_S) == [row(EVENT_US)]
        with pytest.raises(Refused, match="throttled: ProvisionedThroughputExceeded") as caught:
            await table.fetch(["a"], LONG_S)
        assert caught.value.reason is Reason.OVERLOADED
        assert caught.value.retry_after_s > 0
        assert await table.fetch(["a"], LONG_S) == [row(EVENT_US)]
        assert meddler.calls["BatchGetItem"] == 3


async def test_one_throttled_call_of_several_refuses_the_read(dynamodb: str, name: str) -> None:
    meddler = Meddler({"BatchGetItem": {2}})
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        with pytest.raises(Refused, match="throttled"):
            await table.fetch([f"k{i}" for i in range(250)], LONG_S)


async def test_keys_left_unread_are_asked_for_again(dynamodb: str, name: str) -> None:
    meddler = Meddler(leaves=40)
    keys, rows = [f"k{i}" for i in range(100)], [row(EVENT_US, i) for i in range(100)]
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        async with DynamoTable.open(url_of(dynamodb, name)) as direct:
            await direct.load(keys, rows, LONG_S)
        meddler.bodies.clear()
        assert await table.fetch(keys, LONG_S) == rows
        assert [len(body["RequestItems"][name]["Keys"]) for body in meddler.bodies] == [100, 40]


async def test_second_tries_of_reads_end_with_their_budget(dynamodb: str, name: str) -> None:
    meddler = Meddler(starves=True)
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        outcomes = await asyncio.gather(*(table.fetch([f"k{i}"], LONG_S) for i in range(30)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Refused}
        assert {outcome.reason for outcome in outcomes if isinstance(outcome, Refused)} == {Reason.OVERLOADED}
        # one call each, ten saved tries, and a tenth of a try for every call
        assert meddler.calls["BatchGetItem"] <= 30 + 10 + 5


async def test_a_throttled_writer_slows_down_and_loses_nothing(dynamodb: str, name: str) -> None:
    meddler = Meddler({"PutItem": {1, 2, 5}, "BatchWriteItem": {2}, "UpdateItem": {1}}, leaves=2)
    keys, rows = [f"k{i}" for i in range(60)], [row(EVENT_US, i) for i in range(60)]
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        assert await table.keep_newest(keys[:5], rows[:5], [0] * 5, LONG_S) == 5
        await table.load(keys, rows, LONG_S)
        await table.write_map("views", {"route": b"1"}, LONG_S)
        async with DynamoTable.open(url_of(dynamodb, name)) as direct:
            assert await direct.fetch(keys, LONG_S) == rows
            assert await direct.read_map("views", LONG_S) == {"route": b"1"}
        assert meddler.calls["PutItem"] == 8


async def test_a_writer_that_is_throttled_for_long_is_refused_and_may_write_again(dynamodb: str, name: str) -> None:
    meddler = Meddler({"PutItem": set(range(1, 9))})
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        with pytest.raises(Refused, match="left a write undone 8 times") as caught:
            await keep(table, "a", row(EVENT_US))
        assert caught.value.reason is Reason.OVERLOADED
        assert await table.fetch(["a"], LONG_S) == [None]
        assert await keep(table, "a", row(EVENT_US)) == 1


async def test_a_deadline_holds_while_a_throttled_writer_pauses(dynamodb: str, name: str) -> None:
    meddler = Meddler(starves=True)
    async with in_front_of(dynamodb, meddler) as endpoint, DynamoTable.open(url_of(endpoint, name)) as table:
        with pytest.raises(DeadlineExceeded, match="within 200 ms"):
            await table.load(["a"], [row(EVENT_US)], 0.2)


async def test_a_slow_table_is_left_at_the_deadline_and_found_again(dynamodb: str, name: str) -> None:
    awake = asyncio.Event()

    async def doze(operation: str, body: Body, forward: Forward) -> Body:
        await awake.wait()
        return await forward(body)

    async with DynamoTable.open(url_of(dynamodb, name)) as direct:
        await keep(direct, "a", row(EVENT_US))
    async with in_front_of(dynamodb, doze) as endpoint, DynamoTable.open(url_of(endpoint, name, "")) as table:
        late = (
            table.fetch(["a"], 0.05),
            table.fetch([f"k{i}" for i in range(250)], 0.05),
            table.keep_newest(["a"], [row(EVENT_US)], [0], 0.05),
            table.load(["a"], [row(EVENT_US)], 0.05),
            table.drop("a", 0.05),
            table.read_map("a", 0.05),
            table.write_map("a", {"b": b""}, 0.05),
            table.ping(0.05),
        )
        for outcome in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(outcome, DeadlineExceeded)
            assert "did not answer within 50 ms" in str(outcome)
        awake.set()
        assert await table.fetch(["a"], LONG_S) == [row(EVENT_US)]


async def test_too_many_reads_that_wait_are_refused_at_once(dynamodb: str, name: str) -> None:
    awake = asyncio.Event()

    async def doze(operation: str, body: Body, forward: Forward) -> Body:
        await awake.wait()
        return await forward(body)

    async with DynamoTable.open(url_of(dynamodb, name)):
        pass
    async with in_front_of(dynamodb, doze) as endpoint, DynamoTable.open(url_of(endpoint, name, "")) as table:
        waiting = [asyncio.create_task(table.fetch(["a"], LONG_S)) for _ in range(256)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="256 reads wait") as caught:
            await table.fetch(["a"], LONG_S)
        assert caught.value.reason is Reason.QUEUE_FULL
        awake.set()
        assert await asyncio.gather(*waiting) == [[None]] * 256


async def test_an_endpoint_that_is_gone_is_told(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    async with DynamoTable.open(url_of(endpoint, name, "")) as table:
        for call in (table.fetch(["a"], LONG_S), keep(table, "a", row(EVENT_US)), table.ping(LONG_S)):
            with pytest.raises(Unavailable, match=rf"{name}' in {re.escape(endpoint)} cannot be reached"):
                await call
    with pytest.raises(Unavailable, match="cannot be reached"):
        async with DynamoTable.open(url_of(endpoint, name)):
            pass


async def test_a_connection_that_breaks_off_is_told(name: str) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with DynamoTable.open(url_of(endpoint, name, "")) as table:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await table.fetch(["a"], LONG_S)


@pytest.mark.parametrize("status", [200, 400, 502])
async def test_an_endpoint_that_is_no_dynamodb_is_told(name: str, status: int) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        page = b"<html>hello</html>"
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(page), page))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with DynamoTable.open(url_of(endpoint, name, "")) as table:
            with pytest.raises(Unavailable, match="DynamoDB table"):
                await table.fetch(["a"], LONG_S)


async def test_a_table_that_does_not_exist_is_told_with_what_to_do(dynamodb: str, name: str) -> None:
    async with DynamoTable.open(url_of(dynamodb, name, "")) as table:
        for call in (table.fetch(["a"], LONG_S), keep(table, "a", row(EVENT_US)), table.ping(LONG_S)):
            with pytest.raises(Unavailable, match="does not exist; make it, or add create=true"):
                await call


async def test_no_credentials_are_told(dynamodb: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    async with DynamoTable.open(url_of(dynamodb, name, "")) as table:
        with pytest.raises(Unavailable, match="credentials"):
            await table.ping(LONG_S)


@pytest.mark.parametrize(
    ("key", "bad_row", "told"),
    [
        ("b", row(EVENT_US) + bytes(MAX_ITEM_BYTES), "must have at most 409600 bytes, got 4097"),
        ("b", b"tfr\x01", "must have at least 20 bytes, got 4 for 'b'"),
        ("", row(EVENT_US), "must have 1 to 2048 bytes, got 0"),
        ("é" * 1025, row(EVENT_US), "must have 1 to 2048 bytes, got 2050"),
    ],
)
async def test_what_a_table_cannot_hold_is_refused_before_anything_is_written(
    table: DynamoTable, key: str, bad_row: bytes, told: str
) -> None:
    for write in (
        table.keep_newest(["a", key], [row(EVENT_US), bad_row], [0, 0], LONG_S),
        table.load(["a", key], [row(EVENT_US), bad_row], LONG_S),
    ):
        with pytest.raises(ValueError, match=told):
            await write
    assert await table.fetch(["a"], LONG_S) == [None]


async def test_a_map_that_is_too_large_is_refused_and_stays_as_it_was(table: DynamoTable) -> None:
    await table.write_map("views", {"route": b"1"}, LONG_S)
    for fields, told in (
        ({"route": b"2", "dest": bytes(MAX_ITEM_BYTES)}, "must have at most 409600 bytes"),
        ({str(i): b"2" for i in range(MAX_FIELDS + 1)}, "sets up to 250 fields, got 251 of 'views'"),
    ):
        with pytest.raises(ValueError, match=told):
            await table.write_map("views", fields, LONG_S)
    with pytest.raises(ValueError, match="compares up to 130 fields, got 131"):
        await table.swap_map("views", {str(i): None for i in range(MAX_COMPARED + 1)}, {"route": b"2"}, LONG_S)
    # small enough by itself, and too large with what is there: the server is who knows
    await table.write_map("views", {"dest": bytes(200_000)}, LONG_S)
    with pytest.raises(ValueError, match="takes items of up to 400 KB"):
        await table.write_map("views", {"route": b"2", "tail": bytes(220_000)}, LONG_S)
    assert (await table.read_map("views", LONG_S)).keys() == {"route", "dest"}


async def test_rows_and_views_of_a_mesh_are_written_and_read(table: DynamoTable) -> None:
    store = OnlineStore(table, "test")
    entities, values = [f"e{i}" for i in range(120)], np.arange(240.0).reshape(120, 2)
    assert await store.write(SCHEMA, entities, EVENT_US, values) == 120
    assert await store.write(SCHEMA, entities[:2], np.array([EVENT_US - 1, EVENT_US + 1]), values[:2] + 1) == 1
    await store.publish([SCHEMA], EVENT_US, {"route": 120})
    assert [view.schema() for view in await store.views(LONG_S)] == [SCHEMA]
    keys = [f"{store.key_prefix('route')}{entity}}}" for entity in entities]
    rows = RowLayout(SCHEMA).unpack(await store.fetch(keys, LONG_S), EVENT_US)
    values[1] += 1
    assert np.array_equal(np.frombuffer(rows.values, "<f4").reshape(120, 2), values)


async def test_a_generation_is_loaded_published_and_the_one_before_removed(table: DynamoTable) -> None:
    store = OnlineStore(table, "test")
    entities, numbers = [f"e{i}" for i in range(60)], []
    for n in (1, 2):
        values = np.full((60, 2), float(n))
        numbers.append(number := await store.begin(SCHEMA))
        await store.load(SCHEMA, number, entities, EVENT_US + n, values)
        assert await store.verify(SCHEMA, number, entities, EVENT_US + n, values) == 60
        await store.publish([SCHEMA], EVENT_US + n, {"route": 60}, {"route": number})
    old, new = ([f"{store.key_prefix('route', number)}{entity}}}" for entity in entities] for number in numbers)
    assert [view.generation for view in await store.views(LONG_S)] == [numbers[1]]
    assert await store.retire("route", numbers[0], 0.0) == 60
    assert await table.fetch(old, LONG_S) == [None] * 60
    assert None not in await table.fetch(new, LONG_S)


async def test_an_empty_prefix_drops_nothing(table: DynamoTable) -> None:
    await keep(table, "a", row(EVENT_US))
    with pytest.raises(ValueError, match="prefix must not be empty"):
        await table.drop("", LONG_S)
    assert await table.fetch(["a"], LONG_S) == [row(EVENT_US)]
