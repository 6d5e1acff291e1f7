"""Batch SQL against the plain reading of the contract, over many small histories and a few that are meant to hurt."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import sqlglot
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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
from services.feature.offline import sql
from services.feature.offline import store as offline_module
from services.feature.offline.sql import BIGQUERY, DUCKDB, PORTABLE, SPARK, Dialect
from services.feature.offline.store import Clock, OfflineError, OfflineStore, Spine
from tests.unit.feature.oracle import Event, largest, oracle

S = 1_000_000
COUNT, SUM, MEAN, STD = Aggregate.COUNT, Aggregate.SUM, Aggregate.MEAN, Aggregate.STD
MIN, MAX, FIRST, LAST = Aggregate.MIN, Aggregate.MAX, Aggregate.FIRST, Aggregate.LAST
NUMBERS = (COUNT, SUM, MEAN, STD, MIN, MAX, FIRST)
# names that a careless compiler would use itself
TRIPS = Source(
    "trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver", "entity_id"),
    values=("n", "before", Value("doubled", "n * 2")), labels=("t",), where="before IS NULL OR before <> 13",
)  # fmt: skip
CALLS = Source("calls", "calls/*.parquet", "known_us", "known_us", "seq", entities=("driver",), values=("length",))
VIEW = View(
    "driver",
    "driver",
    (
        *windowed(TRIPS, "n", NUMBERS, ("5s", "1m", "")),
        Feature(TRIPS, STD, "n", "2m", "1m"),
        *windowed(TRIPS, "", (COUNT,), ("1m", "")),
        *windowed(TRIPS, "t", (Aggregate.DISTINCT,), ("5s", "1m", "")),
        *windowed(TRIPS, "entity_id", (Aggregate.DISTINCT,), ("1m",)),
        *(top_k(TRIPS, "t", 2, window) for window in ("5s", "1m", "")),
        *(quantile(TRIPS, "n", q, window) for window in ("5s", "1m", "") for q in (0.0, 0.5, 0.99)),
        *latest(TRIPS, "n", "before", "doubled"),
        Feature(TRIPS, LAST, "n", "7s"),
        last_n(TRIPS, "n", 3),
        last_n(TRIPS, "before", 2, "7s"),
        *windowed(TRIPS, "doubled", (SUM,), ("1m",)),
        *windowed(CALLS, "length", (MEAN, SUM, FIRST), ("1m",)),
        *latest(CALLS, "length"),
    ),
)
EXACT = (COUNT, MIN, MAX, FIRST, LAST, Aggregate.LAST_N, Aggregate.TOP_K, Aggregate.AGE_S)
Histories = Mapping[str, Sequence[Event]]
Asked = tuple[str | None, int]


def write(path: Path, source: Source, events: Sequence[Event]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        source.event_us: pa.array([e.event_us for e in events], pa.int64()),
        source.known_us: pa.array([e.known_us for e in events], pa.int64()),
        source.sequence: pa.array([e.sequence for e in events], pa.int64()),
        **{name: pa.array([e.entities[name] for e in events], pa.string()) for name in source.entities},
        **{name: pa.array([e.labels[name] for e in events], pa.string()) for name in source.labels},
        **{name: pa.array([e.values[name] for e in events], pa.float64()) for name in source.plain},
    }
    pa.parquet.write_table(pa.table(columns), path)


def store_of(folder: Path, histories: Histories) -> OfflineStore:
    for source in (TRIPS, CALLS):
        events = histories.get(source.name, ())
        write(folder / source.name / "a.parquet", source, events[::2])
        write(folder / source.name / "b.parquet", source, events[1::2])
    return OfflineStore(folder)


def trip(
    driver: str | None, known_us: int, sequence: int, n: float | None = None,
    before: float | None = None, t: str | None = None, event_us: int | None = None,
) -> Event:  # fmt: skip
    values = {"n": n, "before": before, "doubled": None if n is None else n * 2}
    at_us = known_us - S if event_us is None else event_us
    return Event(sequence, known_us, at_us, {"driver": driver, "entity_id": t}, values, {"t": t})


def call(driver: str | None, known_us: int, sequence: int, length: float | None) -> Event:
    return Event(sequence, known_us, known_us, {"driver": driver}, {"length": length})


def spine(*asked: Asked) -> Spine:
    return Spine([entity for entity, _ in asked], np.array([at for _, at in asked], dtype=np.int64))


def dicts(view: View, rows: Computed) -> list[dict[str, float | None]]:
    return [
        {c: None if null else float(v) for c, v, null in zip(view.columns, values, nulls, strict=True)}
        for values, nulls in zip(rows.values, rows.null, strict=True)
    ]


def compute(store: OfflineStore, *asked: Asked, view: View = VIEW) -> list[dict[str, float | None]]:
    return dicts(view, store.compute(view, spine(*asked)))


def differences(view: View, histories: Histories, asked: Sequence[Asked], rows: Computed) -> list[str]:
    """Where the rows are not what the contract says."""
    counted = {name: [e for e in events if e.values.get("before") != 13.0] for name, events in histories.items()}
    kinds = {column: feature for feature in view.features for column in feature.columns}
    found = []
    for (entity, at), row, known in zip(asked, dicts(view, rows), rows.known, strict=True):
        answer = None if entity is None else oracle(view, counted, entity, at)
        if bool(known) != (answer is not None):
            found.append(f"{entity} at {at}: known is {known}")
        for (column, got), expected in zip(row.items(), answer or [None] * len(row), strict=True):
            feature = kinds[column]
            scale = 0.0 if feature.aggregate in EXACT else 1e-9 * max(largest(view, counted, feature), 1.0)
            scale = scale * len(histories["trips"]) if feature.aggregate is SUM else scale
            if feature.aggregate in (Aggregate.DISTINCT, Aggregate.QUANTILE) and expected is not None:
                scale = 1e-9 * abs(expected)
            if not same(got, expected, scale):
                found.append(f"{entity} at {at}, {column}: got {got}, expected {expected}")
    return found


def same(got: float | None, expected: float | None, tolerance: float) -> bool:
    if got is None or expected is None:
        return got is expected
    if not math.isfinite(expected):
        return got == expected or (math.isnan(got) and math.isnan(expected))
    return abs(got - expected) <= tolerance


def with_dialect(monkeypatch: pytest.MonkeyPatch, dialect: Dialect) -> None:
    def program(view: View, relation_of: sql.RelationOf, clock: Clock) -> sql.Program:
        return sql.program(view, relation_of, dialect, clock)

    monkeypatch.setattr(offline_module, "compile_program", program)


@pytest.fixture(params=[DUCKDB, PORTABLE], ids=["own forms", "portable forms"])
def dialect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Dialect:
    with_dialect(monkeypatch, request.param)
    return request.param


# boundaries of steps (1 s, 5 s and 1 m), a microsecond off them, and before 1970
TIMES = st.builds(
    lambda s, us: s * S + us, st.integers(-26, 26).map(lambda n: n * 5), st.sampled_from([0, 0, 0, 0, -1, 1])
)
VALUES = st.sampled_from([None, 0.0, -0.5, 1.0, 3.25, 1e9 + 0.5, -7e-10, math.nan, math.inf, -math.inf, 1e15, 13.0])
DRIVERS = st.sampled_from(["ann", "ann", "bob", None])
LABELS = st.sampled_from([None, "a", "b", "c", "ä", ""])
TRIP = st.builds(trip, DRIVERS, TIMES, st.just(0), VALUES, VALUES, LABELS)
CALL = st.builds(call, DRIVERS, TIMES, st.just(0), VALUES)
ASKED = st.tuples(st.sampled_from(["ann", "ann", "bob", "zoe", None]), TIMES)


def numbered(events: Sequence[Event], sequences: Sequence[int]) -> list[Event]:
    return [dataclasses.replace(event, sequence=n) for event, n in zip(events, sequences, strict=True)]


@settings(
    max_examples=6, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    trips=st.lists(TRIP, min_size=10, max_size=60),
    calls=st.lists(CALL, max_size=5),
    asked=st.lists(ASKED, min_size=10, max_size=30),
    order=st.permutations(range(60)),
)
def test_every_aggregate_is_what_the_contract_says(
    tmp_path_factory: pytest.TempPathFactory, dialect: Dialect, trips: list[Event], calls: list[Event],
    asked: list[Asked], order: list[int],
) -> None:  # fmt: skip
    histories = {"trips": numbered(trips, order[: len(trips)]), "calls": numbered(calls, range(len(calls)))}
    rows = store_of(tmp_path_factory.mktemp("events"), histories).compute(VIEW, spine(*asked, asked[0]))
    assert differences(VIEW, histories, [*asked, asked[0]], rows) == []


def many(seed: int, n: int = 4_000, drivers: str = "ann bob cy", span_s: int = 4_000) -> list[Event]:
    rng = np.random.default_rng(seed)
    labels = [f"place {i}" for i in range(300)]
    return [
        trip(str(rng.choice(drivers.split())), int(at), i, float(rng.normal()), None, str(rng.choice(labels)))
        for i, at in enumerate(rng.integers(0, span_s * S, n))
    ]


def test_so_it_is_over_long_histories_and_many_labels(tmp_path: Path, dialect: Dialect) -> None:
    histories = {"trips": many(1), "calls": []}
    at = np.random.default_rng(2).integers(0, 4_500 * S, 30).tolist()
    asked = [(driver, moment) for driver, moment in zip(["ann", "bob", "cy"] * 10, at, strict=True)]
    rows = store_of(tmp_path, histories).compute(VIEW, spine(*asked))
    assert differences(VIEW, histories, asked, rows) == []


def test_an_event_counts_from_just_after_it_was_known_until_its_step_has_left_the_window(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"trips": [trip("ann", 100 * S, 1, 7.0)]})
    moments = [100 * S, 100 * S + 1, 106 * S - 1, 106 * S]
    rows = compute(store, *(("ann", at) for at in moments))
    assert [row["n_count_5s"] for row in rows] == [None, 1, 1, 0]
    assert [row["n_last_7s"] for row in compute(store, ("ann", 107 * S), ("ann", 107 * S + 1))] == [7.0, None]


def test_no_aggregate_counts_an_event_that_becomes_known_at_that_very_moment(tmp_path: Path, dialect: Dialect) -> None:
    histories = {"trips": [trip("ann", 98 * S, 1, 1.0, t="a"), trip("ann", 100 * S, 2, 7.0, t="b")], "calls": []}
    asked = [("ann", 100 * S), ("ann", 100 * S + 1)]
    rows = store_of(tmp_path, histories).compute(VIEW, spine(*asked))
    assert differences(VIEW, histories, asked, rows) == []
    at, after = dicts(VIEW, rows)
    assert [row["n_max_1m"] for row in (at, after)] == [1.0, 7.0]
    assert [row["n_sum"] for row in (at, after)] == [1.0, 8.0]


def test_of_events_known_in_the_same_microsecond_the_highest_sequence_is_last(tmp_path: Path) -> None:
    same_time = [trip("ann", 100 * S, sequence, float(sequence)) for sequence in (5, 9, 7, 1)]
    (row,) = compute(store_of(tmp_path, {"trips": same_time}), ("ann", 101 * S))
    assert (row["n_last"], row["n_first"], row["n_first_5s"]) == (9.0, 1.0, 1.0)
    assert [row[f"n_last_{i}"] for i in (1, 2, 3)] == [9.0, 7.0, 5.0]


def test_null_is_not_nan_and_neither_is_infinity(tmp_path: Path) -> None:
    values = [None, math.nan, math.inf]
    store = store_of(tmp_path, {"trips": [trip("ann", i * S, i, value) for i, value in enumerate(values)]})
    rows = compute(store, *(("ann", i * S + 1) for i in range(3)))
    assert rows[0]["n_last"] is None
    assert math.isnan(rows[1]["n_last"] or 0.0)
    assert rows[2]["n_last"] == math.inf
    assert [row["n_count_1m"] for row in rows] == [0, 0, 0]
    assert [row["trips_count_1m"] for row in rows] == [1, 2, 3]


def test_a_condition_sees_nan_although_the_statistics_of_the_file_do_not(tmp_path: Path) -> None:
    source = dataclasses.replace(TRIPS, where="n > 5")
    store = store_of(tmp_path, {"trips": [trip("ann", S, 1, math.nan), trip("ann", S, 3, 1.0)]})
    view = View("v", "driver", (*windowed(source, "", (COUNT,), ("1m",)), *latest(source, "n")))
    (row,) = compute(store, ("ann", 2 * S), view=view)
    assert row["trips_count_1m"] == 1
    assert math.isnan(row["n_last"] or 0.0)


def test_what_nothing_was_known_of_has_only_nulls_and_what_was_quiet_has_counts_of_0(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"trips": [trip("ann", 1 * S, 1, 7.0, t="a")]})
    rows = store.compute(VIEW, spine(("zoe", 9 * S), (None, 9 * S), ("ann", 9_000 * S)))
    assert rows.known.tolist() == [False, False, True]
    assert rows.null[:2].all()
    quiet = dicts(VIEW, rows)[2]
    assert [quiet[c] for c in ("n_count_1m", "trips_count_1m", "n_sum_1m", "t_distinct_1m", "length_sum_1m")] == [0] * 5
    assert [quiet[c] for c in ("n_mean_1m", "n_std_1m", "n_min_1m", "n_p50_1m", "t_top_1_1m", "n_first_1m")] == [
        None
    ] * 6
    assert (quiet["n_sum"], quiet["n_last"], quiet["length_last"]) == (7.0, 7.0, None)


def test_the_answer_has_the_spines_order_and_none_of_its_rows_is_dropped_or_merged(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"trips": many(4, 500)})
    asked = [("bob", 900), ("zoe", 5), ("ann", 1500), ("bob", 900), ("ann", 20), (None, 1)]
    together = compute(store, *((entity, at * S) for entity, at in asked))
    alone = [compute(store, (entity, at * S))[0] for entity, at in asked]
    for row, single in zip(together, alone, strict=True):
        assert [c for c in VIEW.columns if not same(row[c], single[c], 1e-12)] == []


def test_a_deviation_keeps_no_trace_of_what_left_the_window(tmp_path: Path) -> None:
    outlier = [trip("ann", 0, 0, 1e15), trip("ann", 90 * S + 1, 1, -1e15)]
    even = [trip("ann", (200 + i) * S, 2 + i, 1e9 + i % 2) for i in range(40)]
    constant = [trip("bob", i * S, 100 + i, 1e9 + 1 / 3) for i in range(55)]
    store = store_of(tmp_path, {"trips": [*outlier, *even, *constant]})
    (ann, bob) = compute(store, ("ann", 240 * S), ("bob", 55 * S + 1))
    assert ann["n_std_1m"] == pytest.approx(0.5, rel=1e-6)
    assert ann["n_mean_1m"] == 1e9 + 0.5
    assert bob["n_std_1m"] == pytest.approx(0.0, abs=1e-6)  # 1e-15 of the values
    assert (bob["n_std_5s"], bob["n_std"]) == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))


STEADY = View("v", "driver", windowed(TRIPS, "n", (SUM, MEAN, STD), ("5s", "1m", "")))


def test_an_event_that_becomes_known_later_changes_nothing(tmp_path: Path) -> None:
    asked = Spine(["ann", "bob"] * 20, np.random.default_rng(5).integers(500 * S, 1500 * S, 40))
    then, events = int(asked.as_of_us.max()), many(5)
    before = store_of(tmp_path / "then", {"trips": [e for e in events if e.known_us < then]}).compute(STEADY, asked)
    after = store_of(tmp_path / "now", {"trips": events}).compute(STEADY, asked)
    assert before.null.tobytes() == after.null.tobytes()
    assert before.float32().tobytes() == after.float32().tobytes()


def test_twenty_runs_give_the_same_bytes_whatever_the_order_of_the_events(tmp_path: Path) -> None:
    events = many(6, 6_000)
    shuffled = [events[at] for at in np.random.default_rng(7).permutation(len(events))]
    asked = Spine(["ann", "bob"] * 200, np.random.default_rng(8).integers(0, 4_000 * S, 400))
    stores = [store_of(tmp_path / "a", {"trips": events}), store_of(tmp_path / "b", {"trips": shuffled})]
    assert len({stores[run % 2].compute(STEADY, asked).values.tobytes() for run in range(20)}) == 1


def test_the_event_clock_sees_what_was_not_known_yet(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"trips": [trip("ann", 100 * S, 1, 7.0, event_us=10 * S)]})
    asked = spine(("ann", 12 * S))
    assert not store.compute(VIEW, asked).known[0]
    leaked = dicts(VIEW, store.compute(VIEW, asked, Clock.EVENT))[0]
    assert (leaked["n_count_5s"], leaked["n_last"], leaked["trips_age_s"]) == (1, 7.0, 2.0)


def test_an_empty_spine_has_an_empty_answer(tmp_path: Path) -> None:
    rows = store_of(tmp_path, {"trips": many(9, 10)}).compute(VIEW, spine())
    assert rows.values.shape == rows.null.shape == (0, len(VIEW.columns))


def test_a_spine_with_more_entities_than_moments_is_refused() -> None:
    with pytest.raises(ValueError, match="one moment per entity, got 2 and 1"):
        Spine(["ann", "bob"], np.array([1], dtype=np.int64))


def test_little_memory_is_enough(tmp_path: Path) -> None:
    n = 400_000
    rng = np.random.default_rng(3)
    (tmp_path / "calls").mkdir()
    drivers = pa.array(np.char.add("driver ", (np.arange(n) % 997).astype(str)))
    known_us, length = pa.array(rng.integers(0, 10**9, n)), pa.array(rng.normal(size=n))
    events = {"driver": drivers, "known_us": known_us, "seq": pa.array(np.arange(n)), "length": length}
    pa.parquet.write_table(pa.table(events), tmp_path / "calls" / "a.parquet")
    view = View("v", "driver", (*windowed(CALLS, "length", (SUM, MAX), ("1m", "")), *latest(CALLS, "length")))
    asked = Spine(drivers.slice(0, 40_000), np.full(40_000, 10**9, dtype=np.int64))
    little = OfflineStore(tmp_path, threads=1, memory_mb=24).compute(view, asked)
    much = OfflineStore(tmp_path).compute(view, asked)
    assert little.known.all()
    assert little.float32().tobytes() == much.float32().tobytes()


NARROW = View("driver", "driver", (*windowed(CALLS, "length", (SUM,), ("1m",)), *latest(CALLS, "length")))


def calls_with(folder: Path, name: str = "a.parquet", **columns: pa.Array | None) -> Path:
    """A file of one event; columns: what is otherwise, None for what is not there."""
    given = {
        "driver": pa.array(["ann"]), "known_us": pa.array([S]), "seq": pa.array([1]), "length": pa.array([7.0]),
        **columns,
    }  # fmt: skip
    path = folder / "calls" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({k: v for k, v in given.items() if v is not None}), path)
    return path


def test_a_value_that_some_files_lack_is_null_there(tmp_path: Path) -> None:
    calls_with(tmp_path, "a.parquet", length=None)
    calls_with(tmp_path, "b.parquet", known_us=pa.array([2 * S]), seq=pa.array([2]), more=pa.array(["x"]))
    rows = compute(OfflineStore(tmp_path), ("ann", S + 1), ("ann", 3 * S), view=NARROW)
    assert [row["length_last"] for row in rows] == [None, 7.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"length": None}, "a.parquet has no column 'length', it has: driver, known_us, seq"),
        ({"seq": None}, "a.parquet has no column 'seq'"),
        ({"driver": None}, "a.parquet has no column 'driver'"),
        ({"length": pa.array(["7"])}, "a.parquet: column 'length' must be a number, got VARCHAR"),
        ({"driver": pa.array([7])}, "a.parquet: column 'driver' must be text, got BIGINT"),
        ({"known_us": pa.array([1.5])}, "a.parquet: column 'known_us' must be an integer, got DOUBLE"),
    ],
)
def test_a_file_that_is_not_what_the_source_says_is_named(
    tmp_path: Path, columns: dict[str, pa.Array | None], message: str
) -> None:
    calls_with(tmp_path, **columns)
    with pytest.raises(OfflineError, match=f"view 'driver', source 'calls': .*{message}"):
        OfflineStore(tmp_path).compute(NARROW, spine(("ann", 1)))


def test_one_file_without_its_order_is_refused_beside_others_that_have_it(tmp_path: Path) -> None:
    calls_with(tmp_path)
    calls_with(tmp_path, "b.parquet", seq=None)
    with pytest.raises(OfflineError, match=r"b\.parquet has no column 'seq'"):
        OfflineStore(tmp_path).compute(NARROW, spine(("ann", 1)))


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    calls_with(tmp_path, "a.parquet")
    path = calls_with(tmp_path, "b.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OfflineError, match=r"view 'driver', source 'calls': .*b\.parquet"):
        OfflineStore(tmp_path).compute(NARROW, spine(("ann", 1)))


def test_pages_that_are_damaged_are_an_error_that_names_view_source_and_file(tmp_path: Path) -> None:
    calls_with(tmp_path, "a.parquet")
    path = calls_with(tmp_path, "b.parquet")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(OfflineError, match=r"view 'driver', source 'calls': .*b\.parquet"):
        OfflineStore(tmp_path).compute(NARROW, spine(("ann", 2 * S)))


def test_a_source_without_files_is_named_with_its_view(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"view 'driver', source 'trips': there is no file .*trips"):
        OfflineStore(tmp_path).compute(VIEW, spine(("ann", 1)))


def test_folders_named_after_a_column_and_its_value_are_that_column(tmp_path: Path) -> None:
    source = dataclasses.replace(CALLS, path="calls/*/*.parquet", labels=("region",), where="region = '01'")
    for region, length in (("01", 7.0), ("02", 9.0)):
        calls_with(tmp_path, f"region={region}/a.parquet", length=pa.array([length]))
    view = View("v", "driver", (*latest(source, "length"), Feature(source, Aggregate.DISTINCT, "region")))
    (row,) = compute(OfflineStore(tmp_path), ("ann", 2 * S), view=view)
    assert row["length_last"] == 7.0
    assert row["region_distinct"] == pytest.approx(1.0, rel=1e-3)


def test_events_are_read_from_any_file_system(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/offline-test/calls/a.parquet", calls_with(tmp_path).read_bytes())
    (row,) = compute(OfflineStore("memory://offline-test"), ("ann", 2 * S), view=NARROW)
    assert (row["length_sum_1m"], row["length_last"]) == (7.0, 7.0)
    with pytest.raises(OfflineError, match="there is no file memory://elsewhere"):
        compute(OfflineStore("memory://elsewhere"), ("ann", 2 * S), view=NARROW)


@pytest.mark.parametrize("dialect", [SPARK, BIGQUERY], ids=["spark", "bigquery"])
def test_the_same_definitions_become_sql_that_other_engines_parse(dialect: Dialect) -> None:
    program = sql.program(VIEW, lambda source: source.name, dialect)
    queries = [query for _, query in program.steps] + [program.rows]
    for query in queries:
        sqlglot.parse_one(query, read=dialect.name)
        assert not re.search(r"\b(asof|fsum|exclude|read_parquet|strpos\(.*from_base)\b", query.lower()), query


def test_entities_are_those_of_which_something_was_known(tmp_path: Path) -> None:
    events = [trip("bob", 5 * S, 1, 1.0), trip("ann", 7 * S, 2), trip(None, 1, 3), trip("cy", 1, 4, before=13.0)]
    store = store_of(tmp_path, {"trips": events, "calls": [call("dee", 6 * S, 1, None)]})
    assert store.entity_ids(VIEW, 7 * S) == ["bob", "dee"]
    assert store.entity_ids(VIEW, 7 * S + 1) == ["ann", "bob", "dee"]
