"""One small history that is meant to hurt, every aggregate over it, and what each must answer: engines and paths alike.

In it: events of the same microsecond, nulls, NaN, infinities, a value of 1e15 just outside a window, events and
moments on the borders of steps and windows and a microsecond off them, a source that is silent for some and one that
never spoke, unknown entities and none, values that are made, events that do not count, and 12,000 different labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from services.feature.define.definition import (
    Aggregate,
    Feature,
    Source,
    Value,
    View,
    last_n,
    latest,
    quantile,
    top_k,
    windowed,
)
from services.feature.define.rows import Computed
from services.feature.offline.store import Spine
from tests.unit.feature.oracle import Event, oracle

SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
BASE = 1_356_998_400 * SECOND  # midnight, a border of every step
NAN, INF = math.nan, math.inf

RIDES = Source(
    "rides", "rides/*.parquet", "ended_us", "known_us", "seq", entities=("driver", "entity_id"),
    values=("fare", "tip", Value("total", "fare + COALESCE(tip, 0)")), labels=("kind", "badge"),
    where="fare IS NULL OR tip < 100",
)  # fmt: skip
SHIFTS = Source("shifts", "shifts/*.parquet", "known_us", "known_us", "seq", entities=("driver",), values=("length",))
ALARMS = Source("alarms", "alarms/*.parquet", "known_us", "known_us", "seq", entities=("driver",), values=("level",))
SOURCES = (RIDES, SHIFTS, ALARMS)

COUNT, SUM, MEAN, STD = Aggregate.COUNT, Aggregate.SUM, Aggregate.MEAN, Aggregate.STD
MIN, MAX, FIRST, LAST = Aggregate.MIN, Aggregate.MAX, Aggregate.FIRST, Aggregate.LAST
EXACT = {COUNT, MIN, MAX, FIRST, LAST, Aggregate.LAST_N, Aggregate.TOP_K, Aggregate.AGE_S}
VIEW = View(
    "driver",
    "driver",
    (
        *windowed(RIDES, "fare", (COUNT, SUM, MEAN, STD, MIN, MAX), ("1h", "")),
        *windowed(RIDES, "fare", (FIRST,), ("1h", "")),
        *windowed(RIDES, "fare", (SUM, STD), ("24h",)),
        Feature(RIDES, STD, "fare", "2h", "1h"),
        *windowed(RIDES, "", (COUNT,), ("1h", "")),
        *windowed(RIDES, "total", (SUM, MEAN), ("1h",)),
        *windowed(RIDES, "badge", (Aggregate.DISTINCT,), ("1h", "")),
        *(top_k(RIDES, "kind", 3, window) for window in ("1h", "")),
        *(quantile(RIDES, "fare", q, window) for window in ("1h", "") for q in (0.0, 0.5, 0.99)),
        *latest(RIDES, "fare", "tip", "total"),
        Feature(RIDES, LAST, "fare", "1h"),
        last_n(RIDES, "fare", 3),
        last_n(RIDES, "tip", 2, "1h"),
        *windowed(SHIFTS, "length", (SUM, MEAN, FIRST), ("1h",)),
        *latest(SHIFTS, "length"),
        *windowed(ALARMS, "level", (COUNT, MAX), ("",)),
    ),
)


def _ride(
    driver: str | None, after_us: int, sequence: int, fare: float | None, tip: float | None = 0.0,
    kind: str | None = "day", badge: str | None = None,
) -> Event:  # fmt: skip
    total = None if fare is None else fare + (tip or 0.0)
    known_us = BASE + after_us
    names = {"driver": driver, "entity_id": kind}
    values = {"fare": fare, "tip": tip, "total": total}
    return Event(sequence, known_us, known_us - 7 * MINUTE, names, values, {"kind": kind, "badge": badge})


def _shift(driver: str | None, after_us: int, sequence: int, length: float | None) -> Event:
    return Event(sequence, BASE + after_us, BASE + after_us, {"driver": driver}, {"length": length})


# (driver, after BASE, sequence, fare, tip, kind, badge)
_RIDES = (
    # on the borders of the window that begins at HOUR, and a microsecond off them
    _ride("ann", 0, 5, 3.25, None, None),
    _ride("ann", 0, 6, -8.5, 1.0, "", ""),
    _ride("ann", HOUR - 1, 7, 64.0, 0.5, "night", "a"),
    _ride("ann", HOUR, 8, 0.1, 0.25, "day", "b"),
    _ride("ann", HOUR + 1, 9, 0.2, None, "ä", "b"),
    # one microsecond, many sequences, and not in their order
    _ride("ann", HOUR + 20 * MINUTE, 14, None, 2.0, "day", None),
    _ride("ann", HOUR + 20 * MINUTE, 12, 5.5, 99.9, "night", "ä"),
    _ride("ann", HOUR + 20 * MINUTE, 13, NAN, -1.0, "night", "c"),
    _ride("ann", HOUR + 20 * MINUTE, 11, INF, 3.0, None, "d"),
    _ride("ann", HOUR + 25 * MINUTE - 1, 16, -INF, 3.0, "day", "d"),
    _ride("ann", HOUR + 25 * MINUTE, 15, -7e-10, 3.0, "day", "d"),
    # these do not count: the tip is too much, unknown, or not a number
    _ride("ann", HOUR + 30 * MINUTE, 20, 1e9, 100.0, "void", "v1"),
    _ride("ann", HOUR + 30 * MINUTE, 21, 1e9, None, "void", "v2"),
    _ride("ann", HOUR + 30 * MINUTE, 22, 1e9, NAN, "void", "v3"),
    _ride("ann", 2 * HOUR - 1, 30, 17.0, 0.0, "night", "e"),
    _ride("ann", 2 * HOUR, 31, 18.0, INF, "day", "f"),
    _ride("ann", 2 * HOUR, 32, None, None, "dusk", "f"),
    _ride("ann", 2 * HOUR + 5 * MINUTE, 33, 2.5, -INF, "dusk", "g"),
    _ride("ann", 30 * HOUR, 34, NAN, 4.0, "dusk", "g"),
    # a value that a window has left behind must leave no trace in it
    _ride("bob", HOUR - 1, 40, 1e15, 0.0, "day", "x"),
    _ride("bob", HOUR + MINUTE, 41, 0.1, 0.0, "day", "x"),
    _ride("bob", HOUR + 2 * MINUTE, 42, 0.2, 0.0, "day", "y"),
    _ride("bob", HOUR + 10 * MINUTE, 43, 0.4, 0.0, "night", "y"),
    _ride("bob", 2 * HOUR - 30 * SECOND, 44, 0.3, 0.0, "night", "z"),
    # one event; nothing that counts; nobody
    _ride("one", HOUR + 7 * MINUTE, 50, -3.5, 1.0, "day", "x"),
    _ride("void", HOUR + 8 * MINUTE, 51, 1.0, 200.0),
    _ride(None, HOUR + 9 * MINUTE, 52, 1.0),
)
# beyond what the estimate for few labels may answer
_MANY = tuple(
    _ride("many", HOUR + nth * 250_000, 1_000 + nth, (nth % 977) / 8, 0.5, f"k{nth % 31}", f"badge {nth}")
    for nth in range(12_000)
)
_SHIFTS = (
    _shift("ann", HOUR, 1, 4.5),
    _shift("ann", HOUR + 50 * MINUTE, 2, None),
    _shift("many", HOUR - 1, 3, 8.0),
    _shift(None, HOUR, 4, 1.0),
)
EVENTS: Mapping[str, Sequence[Event]] = {"rides": (*_RIDES, *_MANY), "shifts": _SHIFTS, "alarms": ()}

_MOMENTS = (
    *(0, 1, HOUR - 1, HOUR, HOUR + 1, HOUR + 20 * MINUTE, HOUR + 20 * MINUTE + 1, HOUR + 25 * MINUTE),
    *(
        2 * HOUR - 1,
        2 * HOUR,
        2 * HOUR + 1,
        2 * HOUR + 5 * MINUTE - 1,
        2 * HOUR + 5 * MINUTE,
        2 * HOUR + 5 * MINUTE + 1,
    ),
    *(3 * HOUR, 24 * HOUR, 25 * HOUR, 25 * HOUR + 1, 26 * HOUR, 400 * HOUR),
)
ASKED: Sequence[tuple[str | None, int]] = (
    *(("ann", BASE + after_us) for after_us in _MOMENTS),
    *(("bob", BASE + after_us) for after_us in (HOUR, 2 * HOUR, 2 * HOUR + 1, 3 * HOUR, 30 * HOUR)),
    *((driver, BASE + 2 * HOUR) for driver in ("one", "void", "nobody", "", None)),
    ("many", BASE + HOUR),
    ("many", BASE + 2 * HOUR),
    ("ann", BASE + 2 * HOUR),  # again
)


def spine() -> Spine:
    return Spine([entity for entity, _ in ASKED], np.array([at for _, at in ASKED], dtype=np.int64))


def counted(source: str) -> list[Event]:
    """The events that `where` lets through."""
    return [event for event in EVENTS[source] if source != "rides" or _counts(event)]


def _counts(ride: Event) -> bool:
    fare, tip = ride.values["fare"], ride.values["tip"]
    return fare is None or (tip is not None and tip < 100)  # NaN is above every number


def write(folder: Path) -> None:
    """As Parquet, in two files each: where the sources say, below the folder."""
    for source in SOURCES:
        (folder / source.name).mkdir(parents=True)
        events = EVENTS[source.name]
        for name, part in {"a": events[::2], "b": events[1::2]}.items():
            pa.parquet.write_table(table_of(source, part), folder / source.name / f"{name}.parquet")


def table_of(source: Source, events: Sequence[Event]) -> pa.Table:
    times = {source.event_us: "event_us", source.known_us: "known_us", source.sequence: "sequence"}
    return pa.table({
        **{name: pa.array([getattr(e, what) for e in events], pa.int64()) for name, what in times.items()},
        **{name: pa.array([e.entities[name] for e in events], pa.string()) for name in source.entities},
        **{name: pa.array([e.labels[name] for e in events], pa.string()) for name in source.labels},
        **{name: pa.array([e.values[name] for e in events], pa.float64()) for name in source.plain},
    })  # fmt: skip


@cache
def expected() -> Computed:
    """What the contract says, by the oracle."""
    return _computed(VIEW)


def _computed(view: View) -> Computed:
    histories = {source.name: counted(source.name) for source in SOURCES}
    answers = [None if entity is None else oracle(view, histories, entity, at) for entity, at in ASKED]
    rows = [[None] * len(view.columns) if answer is None else answer for answer in answers]
    values = np.array([[0.0 if value is None else value for value in row] for row in rows])
    null = np.array([[value is None for value in row] for row in rows])
    return Computed(values, null, np.array([answer is not None for answer in answers]))


@cache
def tolerances() -> NDArray[np.float64]:
    """(rows, columns): 0 where an answer must be exact, else 1e-9 of the largest magnitude that was aggregated."""
    found = np.zeros(expected().values.shape)
    at = 0
    for feature in VIEW.features:
        if feature.aggregate in (Aggregate.DISTINCT, Aggregate.QUANTILE):
            found[:, at] = 1e-9 * np.abs(expected().values[:, at])
        elif feature.aggregate not in EXACT:
            # of what was aggregated, not of all there is: an outlier outside the window must leave no trace
            ends = [
                Feature(feature.source, end, feature.value, feature.window, feature.resolution) for end in (MIN, MAX)
            ]
            extremes = _computed(View("extremes", VIEW.entity, ends))
            found[:, at] = 1e-9 * np.abs(np.where(extremes.null, 0.0, extremes.values)).max(axis=1)
        at += len(feature.columns)
    return found


def differences(found: Computed, wanted: Computed | None = None) -> list[str]:
    """Where the rows are not what was wanted, which is what the contract says unless given."""
    wanted = wanted or expected()
    return list(_differences(found, wanted))


def _differences(found: Computed, wanted: Computed) -> Iterator[str]:
    for row, (entity, at_us) in enumerate(ASKED):
        where = f"{entity} at BASE + {at_us - BASE}"
        if bool(found.known[row]) != bool(wanted.known[row]):
            yield f"{where}: known is {found.known[row]}"
        for at, column in enumerate(VIEW.columns):
            got, want = _cell(found, row, at), _cell(wanted, row, at)
            if not _same(got, want, float(tolerances()[row, at])):
                yield f"{where}, {column}: got {got}, expected {want}"


def _cell(rows: Computed, row: int, at: int) -> float | None:
    return None if rows.null[row, at] else float(rows.values[row, at])


def _same(got: float | None, want: float | None, tolerance: float) -> bool:
    if got is None or want is None:
        return got is want
    if not math.isfinite(want):
        return got == want or (math.isnan(got) and math.isnan(want))
    return abs(got - want) <= tolerance
