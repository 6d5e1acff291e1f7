from __future__ import annotations

import struct
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.feature.define.definition import Aggregate, Source, View, latest, quantile, top_k, windowed
from services.feature.define.events import Events
from services.feature.tiles.kernel import ViewKernel
from services.feature.tiles.plan import compiled
from services.feature.tiles.state import MAGIC, Codec, DamagedState, ForeignState

NOW_US = 1_384_000_000_000_000
HOUR_US = 3_600_000_000
SALES = Source("sales", "sales/*", "event_us", "known_us", "seq", ("shop",), ("price",), ("till",))
SMALL = View(
    "small", "shop", (*windowed(SALES, "price", (Aggregate.SUM, Aggregate.COUNT), ("12h",)), *latest(SALES, "price"))
)
LARGE = View(
    "large",
    "shop",
    (
        *windowed(SALES, "price", (Aggregate.STD, Aggregate.MAX, Aggregate.FIRST), ("12h", "1h", "")),
        *windowed(SALES, "till", (Aggregate.DISTINCT,), ("12h",)),
        top_k(SALES, "till", 2),
        quantile(SALES, "price", 0.5, "1h"),
        *latest(SALES, "price"),
    ),
)


def sales(*times_us: int) -> Events:
    n = len(times_us)
    known_us = np.array(times_us, dtype=np.int64)
    price = (np.arange(n) + 0.5, np.zeros(n, dtype=np.bool_))
    return Events(
        "sales", np.arange(n), known_us, known_us, {"shop": ["here"] * n}, {"price": price}, {"till": ["a"] * n}
    )


def state_of(view: View, *times_us: int) -> bytes:
    return ViewKernel(view).apply({"here": None}, sales(*times_us), np.arange(5, 5 + len(times_us)))["here"]


FULL = state_of(LARGE, *(NOW_US + n * HOUR_US for n in range(6)))


def again(body: bytes) -> bytes:
    """As if the body had been written."""
    return body + struct.pack("<I", crc32(body))


def test_the_layout_of_version_1_never_changes() -> None:
    state = state_of(SMALL, NOW_US, NOW_US + 7)
    head = (NOW_US + 7, NOW_US, 6, 1, 1)  # newest, oldest, position; one tile and one latest event
    tile = (NOW_US // HOUR_US, 2.0, 2.0)  # index, how many, their sum
    event = (NOW_US + 7, 1, 1.5)
    schema_hash = ViewKernel(SMALL).schema_hash
    body = MAGIC + struct.pack("<Q5qqddqqd", schema_hash, *head, *tile, *event)
    assert state == again(body)


def test_the_meaning_of_a_state_is_told_apart_by_a_hash_that_never_changes() -> None:
    assert f"{ViewKernel(SMALL).schema_hash:016x}" == "1108c7b0368d2062"


def test_what_was_put_together_comes_apart_again() -> None:
    plan = compiled(LARGE)
    codec = Codec(plan)
    opened = codec.open([FULL, None, FULL])
    assert codec.pack(opened) == [FULL, codec.empty, FULL]
    assert (list(opened.damaged), list(opened.foreign)) == ([], [])


@given(st.data())
def test_a_state_with_flipped_bits_is_damaged(data: st.DataObject) -> None:
    damaged = bytearray(FULL)
    for bit in data.draw(st.sets(st.integers(0, 8 * len(FULL) - 1), min_size=1, max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    assert_unreadable(bytes(damaged))


@given(st.integers(0, len(FULL) - 1))
def test_a_state_cut_short_is_damaged(length: int) -> None:
    assert_unreadable(FULL[:length])


@given(st.binary(max_size=300))
def test_other_bytes_are_damaged(junk: bytes) -> None:
    assert_unreadable(junk)
    assert_unreadable(FULL + junk + b"\x01")
    assert_unreadable(again(MAGIC + junk))


@given(st.integers(0, 40), st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None)
def test_a_head_whose_counts_do_not_fit_is_damaged_even_where_the_checksum_holds(word: int, number: int) -> None:
    plan = compiled(LARGE)
    counts = len(plan.runs) + len(plan.recents) + len(plan.sketches)
    at = 12 + 8 * (3 + word % counts)
    if struct.unpack_from("<q", FULL, at)[0] == number:
        return
    assert_unreadable(again(FULL[:at] + struct.pack("<q", number) + FULL[at + 8 : -4]))


def assert_unreadable(state: bytes) -> None:
    kernel = ViewKernel(LARGE)
    with pytest.raises((DamagedState, ForeignState)):
        kernel.check(state)
    with pytest.raises((DamagedState, ForeignState), match="entity 'here'"):
        kernel.apply({"here": state}, sales(NOW_US))
    with pytest.raises((DamagedState, ForeignState)):
        kernel.at_positions(state, {"sales": 1})
    computed = kernel.rows([FULL, state], NOW_US + 6 * HOUR_US)
    assert computed.known.tolist() == [True, False]
    assert computed.null[1].all()
    assert kernel.known_us([state, FULL]).tolist() == [0, NOW_US + 5 * HOUR_US]
    assert kernel.damaged + kernel.foreign == 1


def test_a_state_of_another_view_is_foreign_and_both_hashes_are_told() -> None:
    ours, theirs = ViewKernel(LARGE), ViewKernel(SMALL)
    with pytest.raises(ForeignState, match=f"{theirs.schema_hash:016x}, expected {ours.schema_hash:016x}"):
        ours.check(state_of(SMALL, NOW_US))
