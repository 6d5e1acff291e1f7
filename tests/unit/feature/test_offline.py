from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from services.feature.definition import Aggregate, Feature, Source, View, latest, window_us, windowed
from services.feature.offline import OfflineError, OfflineStore, Spine

S = 1_000_000
COUNT, MEAN, STD = Aggregate.COUNT, Aggregate.MEAN, Aggregate.STD
TRIPS = Source("trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver",), values=("fare", "tip"))
CALLS = Source("calls", "calls/*.parquet", "known_us", "known_us", "seq", entities=("driver",), values=("length",))
WINDOWS = ("5s", "1m", "1h")
VIEW = View(
    "driver",
    "driver",
    (
        *windowed(TRIPS, "fare", (COUNT, MEAN, STD), WINDOWS),
        *windowed(TRIPS, "", (COUNT,), ("1m",)),
        *latest(TRIPS, "fare", "tip"),
        *windowed(CALLS, "length", (MEAN,), ("1m",)),
        *latest(CALLS, "length"),
    ),
)

Event = tuple[str | None, int, int, float | None]  # driver, known_us, sequence, value


def write(path: Path, events: Sequence[Event], *values: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "driver": pa.array([event[0] for event in events], pa.string()),
        "at_us": pa.array([event[1] - S for event in events], pa.int64()),
        "known_us": pa.array([event[1] for event in events], pa.int64()),
        "seq": pa.array([event[2] for event in events], pa.int64()),
        **{name: pa.array([event[3] for event in events], pa.float64()) for name in values},
    }
    pa.parquet.write_table(pa.table(columns), path)


def store_of(folder: Path, trips: Sequence[Event], calls: Sequence[Event] = ()) -> OfflineStore:
    write(folder / "trips" / "a.parquet", trips[::2], "fare", "tip")
    write(folder / "trips" / "b.parquet", trips[1::2], "fare", "tip")
    write(folder / "calls" / "a.parquet", calls, "length")
    return OfflineStore(folder)


def compute(store: OfflineStore, *spine: tuple[str | None, int]) -> list[dict[str, float]]:
    rows = store.compute(VIEW, Spine([s[0] for s in spine], np.array([s[1] for s in spine], dtype=np.int64)))
    assert rows.dtype == np.float32
    return [dict(zip(VIEW.columns, row, strict=True)) for row in rows.tolist()]


def by_hand(events: Sequence[Event], feature: Feature, driver: str, as_of_us: int) -> float:
    """The definition, read aloud."""
    known = sorted((e for e in events if e[0] == driver and e[1] < as_of_us), key=lambda e: (e[1], e[2]))
    if feature.aggregate is Aggregate.AGE_S:
        return (as_of_us - known[-1][1]) / S if known else math.nan
    if feature.aggregate is Aggregate.LAST:
        value = known[-1][3] if known else None
        return value if value is not None and math.isfinite(value) else math.nan
    recent = [e for e in known if as_of_us - window_us(feature.window) <= e[1]]
    if not feature.value:
        return len(recent)
    values = [e[3] for e in recent if e[3] is not None and math.isfinite(e[3])]
    if feature.aggregate is COUNT:
        return len(values)
    if not values:
        return math.nan
    return float(np.mean(values) if feature.aggregate is MEAN else np.std(values))


def random_events(seed: int, n: int = 400) -> list[Event]:
    """Ties, nulls, values that are not finite, and events of nobody."""
    rng = np.random.default_rng(seed)
    values: list[float | None] = rng.choice([1.5, -3.25, 700.125, 0.0], n).tolist()
    for at in rng.choice(n, n // 8, replace=False).tolist():
        values[at] = (None, math.inf, math.nan)[at % 3]
    known_us = (rng.integers(0, 200, n) * S).tolist()
    drivers = rng.choice(["ann", "bob", "cy", ""], n).tolist()
    return [(d or None, at, i, v) for i, (d, at, v) in enumerate(zip(drivers, known_us, values, strict=True))]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_aggregate_is_what_its_definition_says(tmp_path: Path, seed: int) -> None:
    trips, calls = random_events(seed), random_events(seed + 10, 60)
    rng = np.random.default_rng(seed)
    spine = [(driver, int(at)) for driver in ("ann", "bob", "cy") for at in rng.integers(-5, 260, 40) * S]
    spine += [(driver, at + us) for driver, at in spine[::5] for us in (-1, 1)]
    got = compute(store_of(tmp_path, trips, calls), *spine)
    for (driver, as_of_us), row in zip(spine, got, strict=True):
        heard = any(e[0] == driver and e[1] < as_of_us for e in (*trips, *calls))
        for feature in VIEW.features:
            events = trips if feature.source is TRIPS else calls
            expected = by_hand(events, feature, driver, as_of_us) if heard else math.nan
            assert row[feature.name] == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), (driver, feature.name)


def test_an_event_counts_from_just_after_it_was_known_until_its_window_has_passed(tmp_path: Path) -> None:
    store = store_of(tmp_path, [("ann", 100 * S, 1, 7.0)])
    moments = [100 * S, 100 * S + 1, 105 * S, 105 * S + 1]
    counts = [row["fare_count_5s"] for row in compute(store, *(("ann", at) for at in moments))]
    assert counts == pytest.approx([math.nan, 1, 1, 0], nan_ok=True)


def test_of_events_known_in_the_same_microsecond_the_highest_sequence_is_last(tmp_path: Path) -> None:
    same = [("ann", 100 * S, sequence, float(sequence)) for sequence in (5, 9, 7, 1)]
    assert compute(store_of(tmp_path, same), ("ann", 101 * S))[0]["fare_last"] == 9.0


def test_the_last_value_is_null_where_the_last_event_had_none(tmp_path: Path) -> None:
    row = compute(store_of(tmp_path, [("ann", 1 * S, 1, 7.0), ("ann", 2 * S, 2, None)]), ("ann", 4 * S))[0]
    assert math.isnan(row["fare_last"])
    assert row["trips_age_s"] == 2.0


def test_what_nothing_was_known_of_has_only_nulls_and_what_was_quiet_has_counts_of_0(tmp_path: Path) -> None:
    store = store_of(tmp_path, [("ann", 1 * S, 1, 7.0)])
    unknown, nobody, quiet = compute(store, ("zoe", 9 * S), (None, 9 * S), ("ann", 9_000 * S))
    assert all(math.isnan(value) for value in (*unknown.values(), *nobody.values()))
    assert (quiet["fare_count_1h"], quiet["trips_count_1m"]) == (0, 0)
    assert math.isnan(quiet["fare_mean_1h"])
    assert math.isnan(quiet["fare_std_1h"])


def test_the_answer_has_the_spines_order_and_none_of_its_rows_is_dropped_or_merged(tmp_path: Path) -> None:
    store = store_of(tmp_path, random_events(4))
    ids = ["bob", "zoe", "ann", "bob", "ann", None]
    moments = np.array([90, 5, 150, 90, 20, 1], dtype=np.int64) * S
    together = store.compute(VIEW, Spine(ids, moments))
    alone = [store.compute(VIEW, Spine([ids[at]], moments[at : at + 1])) for at in range(len(ids))]
    assert together.tobytes() == np.concatenate(alone).tobytes()


def test_an_event_that_becomes_known_later_never_changes_a_row_by_a_single_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    events = [(str(rng.choice(["ann", "bob"])), int(at), i, float(rng.normal())) for i, at in
              enumerate(rng.integers(0, 300 * S, 600))]  # fmt: skip
    spine = Spine(["ann", "bob"] * 20, rng.integers(50 * S, 150 * S, 40))
    then = spine.as_of_us.max()
    before = store_of(tmp_path / "then", [e for e in events if e[1] < then]).compute(VIEW, spine)
    after = store_of(tmp_path / "now", events).compute(VIEW, spine)
    assert not np.isnan(before).all()
    assert before.tobytes() == after.tobytes()


def test_the_same_input_gives_the_same_bytes_whatever_the_order_of_the_events(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    events = [("ann", int(at), i, float(value)) for i, (at, value) in
              enumerate(zip(rng.integers(0, 300, 5_000) * S, rng.normal(size=5_000), strict=True))]  # fmt: skip
    spine = Spine(["ann"] * 100, rng.integers(0, 300 * S, 100))
    shuffled = [events[at] for at in rng.permutation(len(events))]
    once, again = (store_of(tmp_path / str(i), e).compute(VIEW, spine) for i, e in enumerate((events, shuffled)))
    assert once.tobytes() == again.tobytes()


def test_the_deviation_of_large_and_close_numbers_is_not_lost(tmp_path: Path) -> None:
    events: list[Event] = [("ann", i * S, i, 1e9 + i % 2) for i in range(10)]
    assert compute(store_of(tmp_path, events), ("ann", 10 * S))[0]["fare_std_1m"] == pytest.approx(0.5)


def test_an_empty_spine_has_an_empty_answer(tmp_path: Path) -> None:
    rows: NDArray[np.float32] = store_of(tmp_path, random_events(7)).compute(VIEW, Spine([], np.array([], np.int64)))
    assert rows.shape == (0, len(VIEW.columns))


def test_a_spine_with_more_entities_than_moments_is_refused() -> None:
    with pytest.raises(ValueError, match="one moment per entity, got 2 and 1"):
        Spine(["ann", "bob"], np.array([1], dtype=np.int64))


def test_a_source_without_files_is_named_with_its_view(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="view 'driver': source 'trips' has no file"):
        OfflineStore(tmp_path).compute(VIEW, Spine(["ann"], np.array([1], dtype=np.int64)))


def test_a_file_that_lacks_a_column_is_named_with_its_view(tmp_path: Path) -> None:
    store = store_of(tmp_path, [("ann", 1, 1, 7.0)])
    write(tmp_path / "calls" / "a.parquet", [("ann", 1, 1, 7.0)])
    with pytest.raises(OfflineError, match=r"view 'driver': .*length"):
        store.compute(VIEW, Spine(["ann"], np.array([1], dtype=np.int64)))
