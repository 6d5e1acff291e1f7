"""What every Table promises, as checks of one that is empty; each store's own tests run them all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np

from services.feature.define.schema import ViewSchema
from services.feature.online.packed import RowLayout
from services.feature.online.table import Table

LONG_S = 20.0
EVENT_US = 1_384_000_000_000_000
SCHEMA = ViewSchema("route", "route", ("late_28d", "flights_28d"))
WIDER = ViewSchema("route", "route", ("late_28d", "flights_28d", "delay_28d"))

Check = Callable[[Table], Awaitable[None]]


def row(event_us: int, value: float = 1.0, schema: ViewSchema = SCHEMA) -> bytes:
    """A packed row whose columns all hold `value`."""
    return RowLayout(schema).pack(event_us, np.full((1, len(schema.columns)), value))[0]


async def keep(table: Table, key: str, kept_row: bytes, expiry_ms: int = 0) -> int:
    return await table.keep_newest([key], [kept_row], [expiry_ms], LONG_S)


async def nothing_was_written_and_nothing_is_found(table: Table) -> None:
    await table.ping(LONG_S)
    assert await table.fetch(["a", "b"], LONG_S) == [None, None]
    assert await table.fetch([], LONG_S) == []
    assert await table.keep_newest([], [], [], LONG_S) == 0
    await table.load([], [], LONG_S)
    assert await table.drop("a", LONG_S) == 0
    assert await table.read_map("a", LONG_S) == {}


async def an_older_row_never_overwrites_a_newer_one(table: Table) -> None:
    first, older, same_time, newer = row(EVENT_US, 1), row(EVENT_US - 1, 2), row(EVENT_US, 3), row(EVENT_US + 1, 4)
    assert await keep(table, "a", first) == 1
    assert await keep(table, "a", older) == 0
    assert await table.fetch(["a"], LONG_S) == [first]
    assert await keep(table, "a", same_time) == 1
    assert await table.fetch(["a"], LONG_S) == [same_time]
    assert await keep(table, "a", newer) == 1
    assert await table.fetch(["a"], LONG_S) == [newer]


async def times_are_compared_as_numbers(table: Table) -> None:
    """Not as text or as bytes: 9 is before 10, and 255 before 256."""
    for earlier, later in ((9, 10), (255, 256), (2**53 - 1, 2**53)):
        assert await keep(table, f"k{later}", row(later)) == 1
        assert await keep(table, f"k{later}", row(earlier)) == 0


async def a_row_of_another_schema_does_not_stand_in_the_way(table: Table) -> None:
    wider = row(EVENT_US - 5, schema=WIDER)
    assert await keep(table, "a", row(EVENT_US)) == 1
    assert await keep(table, "a", wider) == 1
    assert await table.fetch(["a"], LONG_S) == [wider]


async def writers_at_once_lose_nothing(table: Table) -> None:
    """Many keys, many writers in any order: each key holds its newest row, whoever wrote it."""
    keys = [f"k{i}" for i in range(20)]
    times = [EVENT_US + int(t) for t in np.random.default_rng(7).permutation(12)]
    await asyncio.gather(*(table.keep_newest(keys, [row(t, t % 97)] * 20, [0] * 20, LONG_S) for t in times))
    newest = max(times)
    assert await table.fetch(keys, LONG_S) == [row(newest, newest % 97)] * 20


async def of_rows_of_one_key_in_one_write_the_newest_stays(table: Table) -> None:
    rows = [row(EVENT_US), row(EVENT_US + 5), row(EVENT_US + 1)]
    assert await table.keep_newest(["a"] * 3, rows, [0] * 3, LONG_S) == 2
    assert await table.fetch(["a"], LONG_S) == [rows[1]]


async def keys_asked_for_twice_are_answered_twice(table: Table) -> None:
    a, b = row(EVENT_US, 1), row(EVENT_US, 2)
    await table.keep_newest(["a", "b"], [a, b], [0, 0], LONG_S)
    assert await table.fetch(["b", "a", "none", "b", "a"], LONG_S) == [b, a, None, b, a]


async def many_keys_are_written_and_read_in_order(table: Table) -> None:
    keys = [f"k{i}" for i in range(250)]
    rows = [row(EVENT_US, i) for i in range(250)]
    assert await table.keep_newest(keys[::2], rows[::2], [0] * 125, LONG_S) == 125
    expected = [rows[i] if i % 2 == 0 else None for i in range(250)]
    assert await table.fetch(keys, LONG_S) == expected
    await table.load(keys, rows, LONG_S)
    assert await table.fetch(keys[::-1], LONG_S) == rows[::-1]


async def a_load_stores_every_row_whatever_was_there(table: Table) -> None:
    older = row(EVENT_US - 1)
    await keep(table, "a", row(EVENT_US))
    await table.load(["a", "b"], [older, older], LONG_S)
    assert await table.fetch(["a", "b"], LONG_S) == [older, older]
    assert await keep(table, "a", row(EVENT_US - 2)) == 0


async def a_row_past_its_expiry_is_absent_for_readers_and_writers(table: Table) -> None:
    past_ms, future_ms = int(time.time() * 1e3) - 2000, int(time.time() * 1e3) + 3_600_000
    lasting = row(EVENT_US)
    await table.keep_newest(["gone", "lasting"], [row(EVENT_US), lasting], [past_ms, future_ms], LONG_S)
    assert await table.fetch(["gone", "lasting"], LONG_S) == [None, lasting]
    older = row(EVENT_US - 1)
    assert await keep(table, "gone", older) == 1
    assert await table.fetch(["gone"], LONG_S) == [older]


async def a_row_written_without_expiry_loses_the_one_it_had(table: Table) -> None:
    newer = row(EVENT_US + 1)
    await keep(table, "a", row(EVENT_US), int(time.time() * 1e3) - 2000)
    await keep(table, "a", newer)
    assert await table.fetch(["a"], LONG_S) == [newer]


async def a_drop_removes_what_starts_so_and_counts_it(table: Table) -> None:
    keys = [f"old:{i}" for i in range(120)] + ["older", "new:old:1"]
    await table.load(keys, [row(EVENT_US)] * len(keys), LONG_S)
    assert await table.drop("old:", LONG_S) == 120
    assert await table.fetch(keys, LONG_S) == [None] * 120 + [row(EVENT_US)] * 2
    assert await table.drop("old:", LONG_S) == 0


async def a_prefix_is_no_pattern(table: Table) -> None:
    keys = ["a*b:1", "axb:1", "a[x]b:1", "a?b:1"]
    await table.load(keys, [row(EVENT_US)] * 4, LONG_S)
    for prefix in ("a*b", "a[x]b", "a?b"):
        assert await table.drop(prefix, LONG_S) == 1
    assert await table.fetch(["axb:1"], LONG_S) == [row(EVENT_US)]


async def keys_are_told_by_their_prefix(table: Table) -> None:
    keys = [f"a*:{i}" for i in range(1_200)]
    await table.load([*keys, "ab:1", "b:a*:1"], [row(EVENT_US)] * (len(keys) + 2), LONG_S)
    told = [key async for some in table.keys("a*:", LONG_S) for key in some]
    assert set(told) == set(keys)
    assert [key async for some in table.keys("c", LONG_S) for key in some] == []


async def fields_of_a_map_are_set_and_others_stay(table: Table) -> None:
    await table.write_map("views", {"route": b"1", "dest": b"\x00\xff"}, LONG_S)
    await table.write_map("views", {"route": b"2", "#name with.dots:and signs": b"3"}, LONG_S)
    await table.write_map("views", {}, LONG_S)
    assert await table.read_map("views", LONG_S) == {
        "route": b"2",
        "dest": b"\x00\xff",
        "#name with.dots:and signs": b"3",
    }
    assert await table.read_map("other", LONG_S) == {}


async def writers_of_one_map_at_once_lose_no_field(table: Table) -> None:
    fields = {f"view{i}": str(i).encode() for i in range(30)}
    await asyncio.gather(*(table.write_map("views", {name: text}, LONG_S) for name, text in fields.items()))
    assert await table.read_map("views", LONG_S) == fields


async def a_map_is_swapped_only_where_it_is_as_it_was_seen(table: Table) -> None:
    assert await table.swap_map("views", {"a": None}, {"a": b"1", "b": b"1"}, LONG_S)
    assert not await table.swap_map("views", {"a": None}, {"a": b"2"}, LONG_S)
    assert not await table.swap_map("views", {"a": b"1", "b": b"2"}, {"a": b"2", "c": b"2"}, LONG_S)
    assert not await table.swap_map("views", {"a": b"1", "c": b"1"}, {"a": b"2"}, LONG_S)
    assert await table.read_map("views", LONG_S) == {"a": b"1", "b": b"1"}
    assert await table.swap_map("views", {"a": b"1", "c": None}, {"c": b"2"}, LONG_S)
    assert await table.read_map("views", LONG_S) == {"a": b"1", "b": b"1", "c": b"2"}
    assert await table.swap_map("views", {"a": b"1", "d": None}, {}, LONG_S)
    assert not await table.swap_map("views", {"a": b"2"}, {}, LONG_S)
    assert await table.swap_map("views", {}, {}, LONG_S)


async def of_swaps_at_once_each_sees_the_one_before(table: Table) -> None:
    async def count_one() -> None:
        while True:
            seen = (await table.read_map("views", LONG_S)).get("n")
            if await table.swap_map("views", {"n": seen}, {"n": str(int(seen or 0) + 1).encode()}, LONG_S):
                return

    await asyncio.gather(*(count_one() for _ in range(8)))
    assert await table.read_map("views", LONG_S) == {"n": b"8"}


CHECKS: tuple[Check, ...] = (
    nothing_was_written_and_nothing_is_found,
    an_older_row_never_overwrites_a_newer_one,
    times_are_compared_as_numbers,
    a_row_of_another_schema_does_not_stand_in_the_way,
    writers_at_once_lose_nothing,
    of_rows_of_one_key_in_one_write_the_newest_stays,
    keys_asked_for_twice_are_answered_twice,
    many_keys_are_written_and_read_in_order,
    a_load_stores_every_row_whatever_was_there,
    a_row_past_its_expiry_is_absent_for_readers_and_writers,
    a_row_written_without_expiry_loses_the_one_it_had,
    a_drop_removes_what_starts_so_and_counts_it,
    a_prefix_is_no_pattern,
    keys_are_told_by_their_prefix,
    fields_of_a_map_are_set_and_others_stay,
    writers_of_one_map_at_once_lose_no_field,
    a_map_is_swapped_only_where_it_is_as_it_was_seen,
    of_swaps_at_once_each_sees_the_one_before,
)
