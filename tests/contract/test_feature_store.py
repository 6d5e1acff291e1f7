"""The client and the store against a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from services.feature.define.schema import ViewSchema
from services.feature.online.packed import RowLayout
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import MAX_SILENT_TIMEOUTS, CommandError, Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.resilience.errors import DeadlineExceeded, Refused, Unavailable

EVENT_US = 1_384_000_000_000_000
SCHEMA = ViewSchema("route", "route", ("late_28d", "flights_28d"))
LONG_S = 10.0


@contextlib.asynccontextmanager
async def connected(url: str, **options: int) -> AsyncIterator[Valkey]:
    async with Valkey(url, **options) as client:
        await client.connected(LONG_S)
        yield client


async def first_success(client: Valkey) -> None:
    """Returns when a command succeeds again."""
    async with asyncio.timeout(LONG_S):
        while True:
            try:
                await client.call("PING", timeout_s=LONG_S)
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.01)
            else:
                return


def row_of(value: float) -> np.ndarray:
    return np.array([[value, 2.0]])


async def stored_value(store: OnlineStore, entity_id: str, schema: ViewSchema = SCHEMA) -> float:
    rows = RowLayout(schema).unpack(await store.fetch([f"{store.key_prefix(schema.name)}{entity_id}}}"], LONG_S), 1)
    return float(np.frombuffer(rows.values, "<f4")[0])


async def test_replies_are_matched_in_order_however_many_are_under_way(valkey: str) -> None:
    async with connected(valkey) as client:
        replies = [client.call("ECHO", str(i), timeout_s=LONG_S) for i in range(2000)]
        assert await asyncio.gather(*replies) == [str(i).encode() for i in range(2000)]


async def test_a_command_that_times_out_or_is_cancelled_keeps_its_place(valkey: str) -> None:
    async with connected(valkey) as client:
        # the first holds up the others on this connection
        held = client.call(
            "EVAL",
            "local t = redis.call('TIME') local e = t[1] * 1e6 + t[2] + 200000 "
            "repeat t = redis.call('TIME') until t[1] * 1e6 + t[2] > e return 'held'",
            0,
            timeout_s=LONG_S,
        )
        late = client.call("ECHO", "late", timeout_s=0.01)
        cancelled = client.call("ECHO", "cancelled", timeout_s=LONG_S)
        after = client.call("ECHO", "after", timeout_s=LONG_S)
        cancelled.cancel()
        with pytest.raises(DeadlineExceeded, match="did not answer within 10 ms"):
            await late
        assert await held == b"held"
        assert await after == b"after"


async def test_an_error_of_one_command_is_its_own(valkey: str) -> None:
    async with connected(valkey) as client:
        wrong = client.call("GETT", "x", timeout_s=LONG_S)
        right = client.call("ECHO", "x", timeout_s=LONG_S)
        with pytest.raises(CommandError, match="unknown command") as caught:
            await wrong
        assert caught.value.code == "ERR"
        assert await right == b"x"


async def test_commands_beyond_the_limit_are_refused_at_once(valkey: str) -> None:
    async with connected(valkey, max_in_flight=2) as client:
        first, second = (client.call("ECHO", "x", timeout_s=LONG_S) for _ in range(2))
        with pytest.raises(Refused, match="2 commands wait for the store"):
            client.call("ECHO", "x", timeout_s=LONG_S)
        assert await asyncio.gather(first, second) == [b"x", b"x"]
        assert await client.call("ECHO", "x", timeout_s=LONG_S) == b"x"


async def test_everyone_who_waits_hears_that_the_store_was_killed_and_it_is_found_again(valkey_process) -> None:
    async with connected(valkey_process.url) as client:
        valkey_process.freeze()
        waiting = [client.call("ECHO", "x", timeout_s=LONG_S) for _ in range(100)]
        valkey_process.kill()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        with pytest.raises(Unavailable, match="cannot be reached"):
            client.call("PING", timeout_s=LONG_S)
        valkey_process.start()
        await first_success(client)


async def test_a_store_that_stays_silent_is_given_up_and_found_again(valkey_process) -> None:
    async with connected(valkey_process.url) as client:
        valkey_process.freeze()
        for _ in range(MAX_SILENT_TIMEOUTS):
            with pytest.raises(DeadlineExceeded):
                await client.call("PING", timeout_s=0.01)
        await asyncio.sleep(0)  # the connection is lost in the next step of the loop
        with pytest.raises(Unavailable, match="cannot be reached"):
            client.call("PING", timeout_s=0.01)
        valkey_process.thaw()
        await first_success(client)


async def test_a_store_that_thaws_in_time_keeps_its_connection_and_its_order(valkey_process) -> None:
    async with connected(valkey_process.url) as client:
        valkey_process.freeze()
        with pytest.raises(DeadlineExceeded):
            await client.call("ECHO", "too late", timeout_s=0.01)
        valkey_process.thaw()
        assert await client.call("ECHO", "in time", timeout_s=LONG_S) == b"in time"


async def test_no_store_is_told_with_its_reason(tmp_path) -> None:
    async with Valkey(f"unix://{tmp_path}/none") as client:
        with pytest.raises(Unavailable, match="No such file"):
            await client.connected(0.2)
        with pytest.raises(Unavailable, match="No such file"):
            client.call("PING", timeout_s=LONG_S)


async def test_a_refused_password_is_told_with_its_reason(valkey: str) -> None:
    async with connected(valkey) as client:
        await client.call("CONFIG", "SET", "requirepass", "secret", timeout_s=LONG_S)
    async with Valkey(valkey) as client:
        with pytest.raises(Unavailable, match="NOAUTH"):
            await client.connected(0.2)
    async with connected(valkey.replace("unix://", "unix://:secret@")) as client:
        assert await client.call("PING", timeout_s=LONG_S) == b"PONG"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_tls_is_spoken_to_those_whose_certificate_is_trusted(valkey: str, folder: Path) -> None:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    made += [
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    await asyncio.to_thread(subprocess.run, made, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(valkey.removeprefix("unix://"))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, forth), copy(back, writer))

    async with await asyncio.start_server(join, "127.0.0.1", 0, ssl=context) as server:
        url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with connected(f"{url}?ca={certificate}") as client:
            assert await client.call("PING", timeout_s=LONG_S) == b"PONG"
        async with Valkey(url) as client:
            with pytest.raises(Unavailable, match="certificate verify failed"):
                await client.connected(1.0)


async def test_commands_that_leave_together_are_answered_together(valkey_process) -> None:
    async with connected(valkey_process.url) as client:
        valkey_process.freeze()
        before = client.call("ECHO", "before", timeout_s=LONG_S)
        commands = [("ECHO", "a"), ("GETT", "x"), ("CONFIG", "SET", "maxmemory", 1), ("SET", "x", "y"), ("ECHO", "b")]
        late = client.pipeline(commands, 0.01)
        replies = client.pipeline(commands, LONG_S)
        after = client.call("ECHO", "after", timeout_s=LONG_S)
        with pytest.raises(DeadlineExceeded):
            await late
        valkey_process.thaw()
        a, unknown, changed, full, b = await replies
        assert (await before, a, changed, b, await after) == (b"before", b"a", b"OK", b"b", b"after")
        assert isinstance(unknown, CommandError)
        assert isinstance(full, Refused)
        assert client.idle


async def test_databases_are_kept_apart(valkey: str) -> None:
    async with connected(f"{valkey}?db=1") as one, connected(f"{valkey}?db=2") as two:
        await one.call("SET", "x", "1", timeout_s=LONG_S)
        assert await two.call("GET", "x", timeout_s=LONG_S) is None


async def test_a_row_that_counted_later_events_is_never_overwritten(valkey: str) -> None:
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        assert await store.write(SCHEMA, ["JFK-LAX"], EVENT_US, row_of(1.0)) == 1
        assert await store.write(SCHEMA, ["JFK-LAX"], EVENT_US - 1, row_of(2.0)) == 0
        assert await stored_value(store, "JFK-LAX") == 1.0
        assert await store.write(SCHEMA, ["JFK-LAX"], EVENT_US, row_of(3.0)) == 1
        assert await stored_value(store, "JFK-LAX") == 3.0
        assert await store.write(SCHEMA, ["JFK-LAX"], EVENT_US + 1, row_of(4.0)) == 1
        assert await stored_value(store, "JFK-LAX") == 4.0


async def test_writers_at_once_leave_the_newest_row_whatever_their_order(valkey: str) -> None:
    entities = [f"e{i}" for i in range(300)]
    async with connected(valkey) as one, connected(valkey) as two:
        stores = [OnlineStore(ValkeyTable(one), "test"), OnlineStore(ValkeyTable(two), "test")]
        times = np.random.default_rng(7).permutation(20)
        await asyncio.gather(
            *(
                stores[i % 2].write(SCHEMA, entities, EVENT_US + int(t), np.full((300, 2), float(t)))
                for i, t in enumerate(times)
            )
        )
        assert {await stored_value(stores[0], entity) for entity in entities} == {19.0}


async def test_a_write_counts_the_rows_it_kept_over_many_chunks(valkey: str) -> None:
    entities = [f"e{i}" for i in range(1000)]
    event_us = np.full(1000, EVENT_US)
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        assert await store.write(SCHEMA, entities, event_us, np.ones((1000, 2))) == 1000
        event_us[::4] -= 1
        assert await store.write(SCHEMA, entities, event_us, np.zeros((1000, 2))) == 750
        assert [await stored_value(store, entity) for entity in entities[:5]] == [1.0, 0.0, 0.0, 0.0, 1.0]


async def test_the_row_with_the_latest_event_wins_within_one_write(valkey: str) -> None:
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        times = np.array([EVENT_US, EVENT_US + 5, EVENT_US + 1])
        assert await store.write(SCHEMA, ["x", "x", "x"], times, np.array([[1.0, 0], [2.0, 0], [3.0, 0]])) == 2
        assert await stored_value(store, "x") == 2.0


async def test_a_row_of_another_schema_does_not_stand_in_the_way(valkey: str) -> None:
    newer = ViewSchema("route", "route", ("late_28d", "flights_28d", "delay_28d"))
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        await store.write(SCHEMA, ["x"], EVENT_US, row_of(1.0))
        assert await store.write(newer, ["x"], EVENT_US - 5, np.array([[7.0, 8.0, 9.0]])) == 1
        assert await stored_value(store, "x", newer) == 7.0


async def test_rows_expire_on_the_wall_clock_but_replayed_ones_stay(valkey: str) -> None:
    brief = ViewSchema("brief", "entity", ("a", "b"), ttl_s=60.0)
    async with connected(valkey) as client:
        now_us = int((await client.call("TIME", timeout_s=LONG_S))[0]) * 1_000_000
        store = OnlineStore(ValkeyTable(client), "test")
        await store.write(brief, ["live", "replayed"], np.array([now_us, EVENT_US]), np.ones((2, 2)))
        live_s, replayed_s = [
            await client.call("TTL", f"tf:test:brief:{{{entity}}}", timeout_s=LONG_S) for entity in ("live", "replayed")
        ]
        assert 3000 < live_s <= 3660
        assert replayed_s == -1


async def test_writing_goes_on_after_the_store_forgot_its_scripts(valkey: str) -> None:
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        await store.write(SCHEMA, ["x"], EVENT_US, row_of(1.0))
        await client.call("SCRIPT", "FLUSH", timeout_s=LONG_S)
        assert await store.write(SCHEMA, ["x"], EVENT_US, row_of(2.0)) == 1
        assert await stored_value(store, "x") == 2.0


@pytest.mark.parametrize(
    ("entity_ids", "values", "told"),
    [
        (["a"], np.ones((2, 2)), "one entity id per row, got 1 ids and 2 rows"),
        (["a", ""], np.ones((2, 2)), "must have 1 to 256 bytes, got ''"),
        (["a", "x" * 257], np.ones((2, 2)), "must have 1 to 256 bytes"),
        (["a", "b"], np.ones((2, 3)), "must have shape"),
    ],
)
async def test_a_write_that_does_not_fit_changes_nothing(
    valkey: str, entity_ids: list[str], values: np.ndarray, told: str
) -> None:
    async with connected(valkey) as client:
        with pytest.raises(ValueError, match=told):
            await OnlineStore(ValkeyTable(client), "test").write(SCHEMA, entity_ids, EVENT_US, values)
        assert await client.call("DBSIZE", timeout_s=LONG_S) == 0


async def test_more_keys_than_one_read_takes_are_answered_in_order(valkey: str) -> None:
    entities = [f"e{i}" for i in range(5000)]
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        await store.write(SCHEMA, entities[1::2], EVENT_US, np.ones((2500, 2)))
        rows = await store.fetch([f"{store.key_prefix('route')}{entity}}}" for entity in entities], LONG_S)
        assert [row is not None for row in rows] == [False, True] * 2500


async def test_published_views_are_read_back_and_replaced_one_by_one(valkey: str) -> None:
    dest = ViewSchema("dest", "dest", ("late",), ttl_s=5.0)
    wider = ViewSchema("dest", "dest", ("late", "early"))
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        await store.publish([SCHEMA, dest], EVENT_US, {"route": 3, "dest": 4})
        views = await store.views()
        assert [(view.schema(), view.watermark_us, view.rows) for view in views] == [
            (dest, EVENT_US, 4),
            (SCHEMA, EVENT_US, 3),
        ]
        await store.publish([wider], EVENT_US + 1, {"dest": 5})
        assert [view.schema() for view in await store.views()] == [wider, SCHEMA]
        assert await OnlineStore(ValkeyTable(client), "other").views() == []
        with pytest.raises(ValueError, match="got none for dest"):
            await store.publish([dest], EVENT_US, {"route": 3})


async def test_a_view_that_cannot_be_read_does_not_take_the_others_with_it(valkey: str, caplog) -> None:
    async with connected(valkey) as client:
        store = OnlineStore(ValkeyTable(client), "test")
        await store.publish([SCHEMA], EVENT_US, {"route": 3})
        text = (await client.call("HGET", "tf:test:views", "route", timeout_s=LONG_S)).decode()
        await client.call("HSET", "tf:test:views", "torn", text[:20], timeout_s=LONG_S)
        await client.call("HSET", "tf:test:views", "lying", text.replace("flights_28d", "x"), timeout_s=LONG_S)
        await client.call("HSET", "tf:test:views", b"\xff", b"\xff", timeout_s=LONG_S)
        ageless = text.replace('"ttl_s":', '"ttl_s":1e305,"was":')
        await client.call("HSET", "tf:test:views", "ageless", ageless, timeout_s=LONG_S)
        for _ in range(2):
            assert [view.name for view in await store.views()] == ["route"]
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "published view unreadable"
        ] * 4
