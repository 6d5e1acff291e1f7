from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from services.feature.define.clock import Clock
from services.feature.define.definition import Source, Value
from services.feature.define.events import from_arrow, prepare, prepared

LANDINGS = Source(
    "landings",
    "landings/*",
    event_us="landed_us",
    known_us="told_us",
    sequence="id",
    entities=("airport",),
    values=("delay", Value("late", "delay >= 15"), Value("hours", "(told_us - landed_us) / 3600000000")),
    labels=("gate",),
    where="gate <> 'X'",
)
TABLE = pa.table(
    {
        "id": pa.array([1, 2, 3, None, 5, 6], pa.int64()),
        "landed_us": pa.array([10, 20, None, 40, 50, 60], pa.int64()),
        "told_us": pa.array([3_600_000_010, 21, 31, 41, None, 61], pa.int64()),
        "airport": ["JFK", None, "EWR", "EWR", "EWR", "JFK"],
        "delay": pa.array([20.0, None, float("nan"), 1.0, 1.0, 3.0]),
        "gate": pa.array(["A", "X", "B", "B", "B", None]).dictionary_encode(),
    }
)


def test_events_at_rest_without_known_time_or_sequence_are_left_out() -> None:
    events = from_arrow(LANDINGS, TABLE)
    assert events.source == "landings"
    assert events.sequence.tolist() == [1, 2, 3, 6]
    assert events.known_us.tolist() == [3_600_000_010, 21, 31, 61]
    assert events.entities == {"airport": ["JFK", None, "EWR", "JFK"]}
    assert events.labels == {"gate": ["A", "X", "B", None]}
    values, null = events.values["delay"]
    assert null.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(values[~null], [20.0, np.nan, 3.0])


def test_by_the_clock_of_events_what_happened_counts_as_known() -> None:
    events = from_arrow(LANDINGS, TABLE, Clock.EVENT)
    assert events.sequence.tolist() == [1, 2, 5, 6]
    assert events.known_us.tolist() == events.event_us.tolist() == [10, 20, 50, 60]


def test_integers_and_large_tables_in_chunks_are_read_alike() -> None:
    whole = TABLE.set_column(4, "delay", pa.array([20, None, 7, 1, 1, 3], pa.int32()))
    chunks = pa.concat_tables([whole.slice(0, 2), whole.slice(2)])
    assert chunks["delay"].num_chunks == 2
    values, null = from_arrow(LANDINGS, chunks).values["delay"]
    assert values[~null].tolist() == [20.0, 7.0, 3.0]
    assert values.dtype == np.float64


def test_prepared_events_have_made_values_and_only_those_for_which_the_condition_is_true() -> None:
    events, counts = prepared(LANDINGS, from_arrow(LANDINGS, TABLE))
    assert counts.tolist() == [True, False, True, False]  # false, and null, do not count
    assert events.sequence.tolist() == [1, 3]
    late, null = events.values["late"]
    assert (late.tolist(), null.tolist()) == ([1.0, 1.0], [False, False])  # NaN is above every number
    assert events.values["hours"][0].tolist()[0] == 1.0


def test_a_source_that_makes_nothing_keeps_its_events_as_they_are() -> None:
    plain = Source("plain", "x", "landed_us", "told_us", "id", ("airport",), ("delay",))
    events = from_arrow(plain, TABLE)
    assert prepare(plain, events) is events


def test_no_events_can_be_prepared() -> None:
    assert len(prepare(LANDINGS, from_arrow(LANDINGS, TABLE.slice(0, 0)))) == 0


def test_a_table_without_a_column_is_refused_by_its_name() -> None:
    with pytest.raises(KeyError, match="gate"):
        from_arrow(LANDINGS, TABLE.drop_columns(["gate"]))
