"""States read as rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.online.packed import EXPIRED, MISSING, NULL, OK, SchemaChanged
from services.feature.stream.finish import StateLayout
from services.feature.stream.log import Logged
from services.feature.stream.logged import events_of
from services.feature.tiles.kernel import ViewKernel

NOW_US = 1_700_000_000_000_000
MINUTE_US = 60_000_000
RIDES = Source("rides", "rides/*.parquet", "begun_us", "known_us", "ride", ("driver",), ("fare",))


def view(*more: str) -> View:
    features = (
        *windowed(RIDES, "", (Aggregate.COUNT,), ("1h",)),
        *windowed(RIDES, "fare", (Aggregate.MAX,), ("1h",), default=-1.0),
        *latest(RIDES, "fare", *more),
    )
    return View("driver", "driver", features, ttl_s=7200.0, stream=True)


def state(kernel: ViewKernel, known_us: int = NOW_US, fare: float | None = 3.5) -> bytes:
    values = {} if fare is None else {"fare": fare}
    events = events_of(RIDES, [Logged(1, known_us - 9, known_us, {"driver": "d"}, {}, values)])
    return kernel.apply({"d": None}, events)["d"]


def unpacked(layout: StateLayout, states: list[bytes | None], as_of_us: int | list[int]) -> tuple[list[object], ...]:
    rows = layout.unpack(states, as_of_us)
    n = len(states)
    return (
        np.frombuffer(rows.values, "<f4").reshape(n, -1).tolist(),
        np.frombuffer(rows.status, np.uint8).reshape(n, -1).tolist(),
        np.frombuffer(rows.event_us, "<i8").tolist(),
        np.frombuffer(rows.age_s, "<f4").tolist(),
    )


def test_a_state_is_finished_at_the_moment_asked_for() -> None:
    kernel = ViewKernel(view())
    layout = StateLayout(view(), kernel)
    one = state(kernel)
    moments = [NOW_US + MINUTE_US, NOW_US + 70 * MINUTE_US, NOW_US + 120 * MINUTE_US, NOW_US - MINUTE_US]
    values, status, event_us, age_s = unpacked(layout, [one] * 4, moments)
    assert values[:2] == [[1.0, 3.5, 3.5, 60.0], [0.0, -1.0, 3.5, 4200.0]]
    assert status == [[OK] * 4, [OK, NULL, OK, OK], [EXPIRED] * 4, [MISSING] * 4]
    assert event_us == [NOW_US, NOW_US, NOW_US, 0]
    assert age_s[:3] == [60.0, 4200.0, 7200.0]
    assert math.isnan(age_s[3])  # type: ignore[arg-type]
    assert values[2][1] == -1.0  # type: ignore[index]


def test_nothing_and_what_is_damaged_is_missing_and_told() -> None:
    kernel = ViewKernel(view())
    layout = StateLayout(view(), kernel)
    damaged = bytearray(state(kernel))
    damaged[40] ^= 1
    rows = layout.unpack([None, bytes(damaged), b"", state(kernel)], NOW_US + 1)
    assert np.frombuffer(rows.status, np.uint8).reshape(4, -1)[:, 0].tolist() == [MISSING, MISSING, MISSING, OK]
    assert (rows.unreadable, rows.foreign) == (2, 0)
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [0, 0, 0, NOW_US]


def test_a_state_of_another_definition_is_not_guessed_at() -> None:
    other = View("driver", "driver", windowed(RIDES, "fare", (Aggregate.SUM,), ("24h",)), stream=True)
    foreign = state(ViewKernel(other))
    layout = StateLayout(view(), ViewKernel(view()))
    with pytest.raises(SchemaChanged):
        layout.unpack([foreign], NOW_US + 1)
    rows = layout.unpack([foreign], NOW_US + 1, foreign_is_missing=True)
    assert (set(rows.status), rows.foreign) == ({MISSING}, 1)


def test_a_watermark_keeps_a_known_row_young_and_makes_no_row() -> None:
    kernel = ViewKernel(view())
    layout = StateLayout(view(), kernel, lambda: NOW_US + 100 * MINUTE_US)
    _, status, event_us, age_s = unpacked(layout, [state(kernel), None], NOW_US + 130 * MINUTE_US)
    assert (status[0][0], status[1][0]) == (OK, MISSING)  # type: ignore[index]
    assert event_us == [NOW_US + 100 * MINUTE_US, 0]
    assert age_s[0] == 1800.0


def test_a_moment_beyond_all_others_is_answered() -> None:
    kernel = ViewKernel(view())
    _, status, _, _ = unpacked(StateLayout(view(), kernel), [state(kernel)], 2**62)
    assert set(status[0]) == {EXPIRED}  # type: ignore[call-overload]


def test_what_a_row_adds_to_an_answer_is_what_it_says() -> None:
    kernel = ViewKernel(view())
    layout = StateLayout(view(), kernel)
    assert layout.answer_bytes == sum(map(len, layout.unpack([state(kernel)], NOW_US)[:4]))
