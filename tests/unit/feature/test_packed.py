from __future__ import annotations

import math
import struct
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.feature.define.schema import ViewSchema
from services.feature.online.packed import EXPIRED, MAGIC, MISSING, NULL, OK, RowLayout, Rows, SchemaChanged

EVENT_US = 1_384_000_000_000_000
SCHEMA = ViewSchema("route", "route", ("flights_28d", "late_28d", "delay_28d"))
ONE_ROW = np.array([[1.5, -2.0, 3.25]], np.float32)


def values_of(rows: Rows, columns: int) -> np.ndarray:
    return np.frombuffer(rows.values, "<f4").reshape(-1, columns)


def status_of(rows: Rows, columns: int) -> list[list[int]]:
    return np.frombuffer(rows.status, np.uint8).reshape(-1, columns).tolist()


def wide(columns: int, ttl_s: float = 0.0) -> ViewSchema:
    return ViewSchema("wide", "entity", tuple(f"c{i}" for i in range(columns)), ttl_s)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values with NaN and infinity, which of them are NULL, and a time per row."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 40)))
    values = draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
    null = draw(hnp.arrays(np.bool_, shape))
    event_us = draw(hnp.arrays(np.int64, shape[0], elements=st.integers(1, 2**53)))
    return values, null, event_us


@given(tables())
def test_what_was_packed_is_what_is_read(table: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    values, null, event_us = table
    layout = RowLayout(wide(values.shape[1]))
    rows = layout.unpack(layout.pack(event_us, values, null), EVENT_US)
    read = values_of(rows, values.shape[1])
    np.testing.assert_array_equal(read[~null], values[~null])
    assert np.isnan(read[null]).all()
    np.testing.assert_array_equal(status_of(rows, values.shape[1]), np.where(null, NULL, OK))
    np.testing.assert_array_equal(np.frombuffer(rows.event_us, "<i8"), event_us)
    expected_age_s = ((EVENT_US - event_us) * 1e-6).astype(np.float32)
    np.testing.assert_array_equal(np.frombuffer(rows.age_s, "<f4"), expected_age_s)
    assert (rows.foreign, rows.unreadable) == (0, 0)


def test_nan_is_a_value_where_the_mask_says_so_and_null_where_there_is_no_mask() -> None:
    layout = RowLayout(SCHEMA)
    values = np.array([[1.0, np.nan, 3.0]])
    told = layout.unpack(layout.pack(EVENT_US, values, np.zeros((1, 3), np.bool_)), EVENT_US)
    assumed = layout.unpack(layout.pack(EVENT_US, values), EVENT_US)
    assert status_of(told, 3) == [[OK, OK, OK]]
    assert status_of(assumed, 3) == [[OK, NULL, OK]]


def test_the_layout_of_version_2_never_changes() -> None:
    row = RowLayout(SCHEMA).pack(EVENT_US, np.array([[1.5, np.nan, 3.25]], np.float32))[0]
    body = MAGIC + struct.pack("<Qq", SCHEMA.schema_hash, EVENT_US)
    body += b"\x02" + struct.pack("<3f", 1.5, math.nan, 3.25)
    assert row == body + struct.pack("<I", crc32(body))


@given(st.data())
def test_a_row_with_flipped_bits_is_missing_and_never_a_wrong_value(data: st.DataObject) -> None:
    layout = RowLayout(SCHEMA)
    row = layout.pack(EVENT_US, ONE_ROW)[0]
    flips = data.draw(st.sets(st.integers(0, 8 * len(row) - 1), min_size=1, max_size=3))
    damaged = bytearray(row)
    for bit in flips:
        damaged[bit // 8] ^= 1 << bit % 8
    rows = layout.unpack([bytes(damaged)], EVENT_US)
    assert rows.unreadable == 1
    assert status_of(rows, 3) == [[MISSING] * 3]
    assert np.isnan(values_of(rows, 3)).all()


@given(st.data())
def test_a_row_cut_short_or_prolonged_is_missing(data: st.DataObject) -> None:
    layout = RowLayout(SCHEMA)
    row = layout.pack(EVENT_US, ONE_ROW)[0]
    damaged = row[: data.draw(st.integers(0, len(row) - 1))] if data.draw(st.booleans()) else row + b"\0"
    rows = layout.unpack([damaged], EVENT_US)
    assert (rows.unreadable, status_of(rows, 3)) == (1, [[MISSING] * 3])


@given(st.binary(max_size=80))
def test_bytes_that_are_no_row_are_missing(noise: bytes) -> None:
    rows = RowLayout(SCHEMA).unpack([noise], EVENT_US)
    assert (rows.unreadable, status_of(rows, 3)) == (1, [[MISSING] * 3])


KINDS = ("plain", "null", "none", "old", "early", "damaged", "short", "foreign")


def kinds_of_rows() -> st.SearchStrategy[list[str]]:
    """Of a few kinds each, as one damaged row is enough for all to be read one by one."""
    some = st.sets(st.sampled_from(KINDS), min_size=1, max_size=4)
    return some.flatmap(lambda kinds: st.lists(st.sampled_from(sorted(kinds)), min_size=24, max_size=60))


@given(kinds_of_rows(), st.booleans(), st.booleans())
def test_many_rows_are_read_as_each_alone(kinds: list[str], one_moment: bool, defaults: bool) -> None:
    schema = ViewSchema("wide", "entity", ("a", "b", "c"), 10.0, (7.0, None, 0.5) if defaults else (None,) * 3)
    layout = RowLayout(schema)
    moments = [EVENT_US + 3_000_000 * (i % 3) for i in range(len(kinds))]
    rows = [row_of(layout, kind, i) for i, kind in enumerate(kinds)]
    asked = EVENT_US + 9 if one_moment else moments
    together = layout.unpack(rows, asked, foreign_is_missing=True)
    alone = [
        layout.unpack([row], EVENT_US + 9 if one_moment else moment, foreign_is_missing=True)
        for row, moment in zip(rows, moments, strict=True)
    ]
    assert together[:4] == tuple(b"".join(row[at] for row in alone) for at in range(4))
    assert together[4:] == (kinds.count("foreign"), kinds.count("damaged") + kinds.count("short"))


def row_of(layout: RowLayout, kind: str, seed: int) -> bytes | None:
    if kind == "none":
        return None
    if kind == "foreign":
        return RowLayout(SCHEMA).pack(EVENT_US, ONE_ROW)[0]
    event_us = EVENT_US + {"old": -10_000_000, "early": 20_000_000}.get(kind, seed)
    values = np.random.default_rng(seed).standard_normal((1, 3))
    row = layout.pack(event_us, values, np.array([[kind == "null", False, kind == "null"]]))[0]
    return {"damaged": row[:30] + bytes([row[30] ^ 1]) + row[31:], "short": row[:-1]}.get(kind, row)


def test_many_rows_of_which_one_has_another_schema_are_not_read() -> None:
    rows = [*RowLayout(wide(3)).pack(EVENT_US, np.ones((40, 3))), *RowLayout(SCHEMA).pack(EVENT_US, ONE_ROW)]
    with pytest.raises(SchemaChanged, match="of view 'wide'"):
        RowLayout(wide(3)).unpack(rows, EVENT_US)


def test_an_intact_row_of_an_unknown_layout_is_unreadable() -> None:
    layout = RowLayout(SCHEMA)
    body = b"tfr\x01" + layout.pack(EVENT_US, ONE_ROW)[0][4:-4]
    rows = layout.unpack([body + struct.pack("<I", crc32(body))], EVENT_US)
    assert (rows.unreadable, rows.foreign) == (1, 0)


def test_a_row_of_another_schema_is_named_and_not_read() -> None:
    other = ViewSchema("route", "route", ("late_28d", "flights_28d", "delay_28d"))
    row = RowLayout(other).pack(EVENT_US, ONE_ROW)[0]
    with pytest.raises(SchemaChanged, match=f"{other.schema_hash:016x}, expected {SCHEMA.schema_hash:016x}"):
        RowLayout(SCHEMA).unpack([row], EVENT_US)
    rows = RowLayout(SCHEMA).unpack([row], EVENT_US, foreign_is_missing=True)
    assert (rows.foreign, rows.unreadable, status_of(rows, 3)) == (1, 0, [[MISSING] * 3])


def test_an_entity_without_a_row_is_missing_among_others() -> None:
    layout = RowLayout(SCHEMA)
    row = layout.pack(EVENT_US, ONE_ROW)[0]
    rows = layout.unpack([None, row, None], EVENT_US + 2_500_000)
    assert status_of(rows, 3) == [[MISSING] * 3, [OK] * 3, [MISSING] * 3]
    np.testing.assert_array_equal(values_of(rows, 3)[1], ONE_ROW[0])
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [0, EVENT_US, 0]
    np.testing.assert_array_equal(np.frombuffer(rows.age_s, "<f4"), np.array([np.nan, 2.5, np.nan], np.float32))


def test_a_row_expires_at_its_time_to_live_and_not_before() -> None:
    layout = RowLayout(wide(2, ttl_s=10.0))
    row = layout.pack(EVENT_US, np.array([[1.0, np.nan]]))[0]
    rows = layout.unpack([row, row], [EVENT_US + 9_999_999, EVENT_US + 10_000_000])
    assert status_of(rows, 2) == [[OK, NULL], [EXPIRED, EXPIRED]]
    assert np.isnan(values_of(rows, 2)[1]).all()
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [EVENT_US, EVENT_US]
    assert np.frombuffer(rows.age_s, "<f4").tolist() == [pytest.approx(9.999999), 10.0]


def test_a_row_that_counted_events_after_the_moment_asked_for_says_so_by_its_age() -> None:
    layout = RowLayout(wide(1, ttl_s=10.0))
    row = layout.pack(EVENT_US, np.array([[1.0]]))[0]
    rows = layout.unpack([row], EVENT_US - 3_000_000)
    assert np.frombuffer(rows.age_s, "<f4").tolist() == [-3.0]


@pytest.mark.parametrize(
    ("event_us", "values", "null", "told"),
    [
        (EVENT_US, np.ones((1, 2)), None, r"must have shape \(n, 3\), got \(1, 2\)"),
        (EVENT_US, np.ones(3), None, r"must have shape \(n, 3\), got \(3,\)"),
        (EVENT_US, np.ones((1, 3)), np.zeros((1, 2), np.bool_), r"null must have the shape"),
        (0, np.ones((1, 3)), None, "event_us must be between 1 and 2.* got 0 to 0"),
        (2**60, np.ones((1, 3)), None, "event_us must be between 1 and"),
        (np.array([EVENT_US, EVENT_US]), np.ones((1, 3)), None, "must be an integer or 1 integers"),
        (np.array([1.5]), np.ones((1, 3)), None, "must be an integer or 1 integers, got float64"),
        (EVENT_US, np.array([[1.0, -1e39, 2.0]]), None, "must fit float32, got -1e"),
    ],
)
def test_what_cannot_be_packed_is_refused(event_us: object, values: object, null: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RowLayout(SCHEMA).pack(event_us, values, null)  # type: ignore[arg-type]


def test_no_rows_are_no_rows() -> None:
    layout = RowLayout(SCHEMA)
    assert layout.pack(EVENT_US, np.empty((0, 3))) == []
    assert layout.unpack([], EVENT_US) == Rows(b"", b"", b"", b"")
