from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from services.feature.check import checks
from services.feature.define.definition import Aggregate, RequestView, Source, Value, View, latest, windowed
from services.feature.define.definitions import Definitions
from services.feature.offline.backfill import Days, backfill, bucket_of, end_us
from services.feature.offline.parts import PartsError
from services.feature.offline.store import Clock, OfflineError, OfflineStore
from services.feature.offline.training import Labels, LabelsError, Wanted, training_set

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
NOON_US = end_us(Days.parse("2013-01-01", "2013-01-01").first) - DAY_US // 2

ARRIVALS = Source(
    "arrivals", "arrivals/*.parquet", "due_us", "arrived_us", "seq", entities=("origin",), values=("delay",)
)
ORIGIN = View(
    "origin",
    "origin",
    (
        *windowed(ARRIVALS, "delay", (Aggregate.COUNT, Aggregate.MEAN), ["6h"]),
        *latest(ARRIVALS, "delay"),
        *windowed(ARRIVALS, "delay", (Aggregate.MAX,), ["1h"], default=-1.0),
    ),
)
BUFFER = RequestView("buffer", ("slack_min",), (Value("left", "input.slack_min - origin.delay_last"),))


@pytest.fixture
def offline(tmp_path: Path) -> OfflineStore:
    """A hundred flights of three airports over three days, each known two hours after it was due."""
    random = np.random.default_rng(7)
    due_us = NOON_US + np.sort(random.integers(0, 3 * DAY_US, 100))
    table = pa.table(
        {
            "due_us": due_us,
            "arrived_us": due_us + 2 * HOUR_US,
            "seq": np.arange(100),
            "origin": random.choice(["JFK", "EWR", "LGA"], 100),
            "delay": random.normal(10, 30, 100),
        }
    )
    (tmp_path / "offline/arrivals").mkdir(parents=True)
    pa.parquet.write_table(table, tmp_path / "offline/arrivals/a.parquet")
    return OfflineStore(tmp_path / "offline")


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    """Some rows twice, an airport that nobody heard of, and none at all."""
    moments = NOON_US + np.arange(40, dtype=np.int64) * 2 * HOUR_US
    airports = ["JFK", "EWR", "XXX", None] * 10
    table = pa.table(
        {
            "airport": pa.array([*airports, *airports]),
            "at": pa.array(np.tile(moments, 2), pa.timestamp("us", tz="UTC")),
            "late": pa.array(np.arange(80) % 2),
            "slack_min": pa.array(np.full(80, 45.0)),
        }
    )
    pa.parquet.write_table(table, tmp_path / "labels.parquet")
    return Labels(str(tmp_path / "labels.parquet"), "at", {"origin": "airport"})


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pa.parquet.read_table(part) for part in sorted(folder.glob("*.parquet"))])


def test_every_label_row_is_there_once_in_its_order(offline: OfflineStore, labels: Labels, tmp_path: Path) -> None:
    parts = training_set(offline, labels, Wanted([ORIGIN], [BUFFER]), str(tmp_path / "out"), chunk_rows=13)
    table, given = read(tmp_path / "out"), pa.parquet.read_table(labels.path)
    assert sum(parts.rows.values()) == 80
    assert table.select(given.column_names).equals(given)
    assert table.column_names[4:] == [
        *(f"origin.{column}" for column in ORIGIN.columns),
        "buffer.left",
    ]


def test_an_airport_that_nobody_heard_of_has_nulls_and_defaults(
    offline: OfflineStore, labels: Labels, tmp_path: Path
) -> None:
    training_set(offline, labels, Wanted([ORIGIN], [BUFFER]), str(tmp_path / "out"))
    unknown = [row for row in read(tmp_path / "out").to_pylist() if row["airport"] in ("XXX", None)]
    assert len(unknown) == 40
    assert {row["origin.delay_count_6h"] for row in unknown} == {None}
    assert {row["origin.delay_max_1h"] for row in unknown} == {-1.0}
    assert {row["buffer.left"] for row in unknown} == {None}


def test_features_on_request_are_worked_out_from_the_values_that_are_served(
    offline: OfflineStore, labels: Labels, tmp_path: Path
) -> None:
    training_set(offline, labels, Wanted([ORIGIN], [BUFFER]), str(tmp_path / "out"))
    rows = [row for row in read(tmp_path / "out").to_pylist() if row["origin.delay_last"] is not None]
    assert rows
    assert [row["buffer.left"] for row in rows] == [float(np.float32(45.0 - row["origin.delay_last"])) for row in rows]


def test_a_training_set_that_was_cut_off_goes_on(offline: OfflineStore, labels: Labels, tmp_path: Path) -> None:
    wanted, out = Wanted([ORIGIN]), str(tmp_path / "out")
    training_set(offline, labels, wanted, out, chunk_rows=20)
    whole = read(tmp_path / "out")
    (tmp_path / "out/part-00002.parquet").unlink()
    untouched = (tmp_path / "out/part-00001.parquet").stat().st_mtime_ns
    training_set(offline, labels, wanted, out, chunk_rows=20)
    assert read(tmp_path / "out").equals(whole)
    assert (tmp_path / "out/part-00001.parquet").stat().st_mtime_ns == untouched


def test_another_definition_does_not_go_on_with_old_parts(
    offline: OfflineStore, labels: Labels, tmp_path: Path
) -> None:
    training_set(offline, labels, Wanted([ORIGIN]), str(tmp_path / "out"))
    other = View("origin", "origin", ORIGIN.features[:2])
    with pytest.raises(PartsError, match="views differ"):
        training_set(offline, labels, Wanted([other]), str(tmp_path / "out"))
    training_set(offline, labels, Wanted([other]), str(tmp_path / "out"), restart=True)
    assert "origin.delay_last" not in read(tmp_path / "out").column_names


def test_labels_may_be_csv_with_moments_in_microseconds(offline: OfflineStore, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"origin,at_us\nJFK,{NOON_US + DAY_US}\n")
    training_set(offline, Labels(str(tmp_path / "labels.csv"), "at_us", {}), Wanted([ORIGIN]), str(tmp_path / "out"))
    assert read(tmp_path / "out")["origin.delay_count_6h"].to_pylist()[0] >= 0


@pytest.mark.parametrize(
    ("time", "entities", "told"),
    [
        ("when", {"origin": "airport"}, "no column 'when' for the moments; there are: airport, at, late, slack_min"),
        ("at", {}, "no column 'origin' for the ids of entity 'origin'"),
        ("late", {"origin": "airport"}, None),
        ("airport", {"origin": "airport"}, "must be a timestamp or int64 microseconds, got string"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused_by_column(
    offline: OfflineStore, labels: Labels, tmp_path: Path, time: str, entities: dict[str, str], told: str | None
) -> None:
    def join() -> None:
        training_set(offline, Labels(labels.path, time, entities), Wanted([ORIGIN]), str(tmp_path / "out"))

    if told is None:
        join()
        return
    with pytest.raises(LabelsError, match=told):
        join()
    assert not (tmp_path / "out").exists()


def test_labels_that_are_no_table_are_refused(offline: OfflineStore, tmp_path: Path) -> None:
    (tmp_path / "labels.parquet").write_text("no table")
    with pytest.raises(LabelsError, match="cannot be read as Parquet or CSV"):
        training_set(offline, Labels(str(tmp_path / "labels.parquet"), "at", {}), Wanted([ORIGIN]), str(tmp_path / "o"))


def test_a_label_without_a_moment_is_refused(offline: OfflineStore, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"origin": ["JFK"], "at": pa.array([None], pa.int64())}), tmp_path / "l.parquet")
    with pytest.raises(LabelsError, match="a moment is null"):
        training_set(offline, Labels(str(tmp_path / "l.parquet"), "at", {}), Wanted([ORIGIN]), str(tmp_path / "out"))


def test_the_check_tells_a_leaky_training_set_from_an_honest_one(
    offline: OfflineStore, labels: Labels, tmp_path: Path
) -> None:
    definitions = Definitions((ORIGIN,))
    for clock in Clock:
        training_set(offline, labels, Wanted([ORIGIN], clock=clock), str(tmp_path / clock.value))
    honest = checks.training(offline, definitions, str(tmp_path / "known"))
    leaky = checks.training(offline, definitions, str(tmp_path / "event"))
    assert (honest.agrees, honest.notes) == (True, [])
    assert not leaky.agrees
    assert leaky.notes == ["the training set says of itself that it was joined by event time"]
    assert {column.column for column in leaky.columns if column.mismatched} >= {"delay_count_6h", "delay_last"}


def test_batch_stream_and_request_agree_on_a_day(offline: OfflineStore) -> None:
    found = checks.day(offline, [ORIGIN], Days.parse("2013-01-02", "2013-01-02").first, rows=400)
    assert [one.path for one in found] == [checks.STREAM, checks.REQUEST]
    assert all(one.agrees for one in found)
    assert found[0].columns[0].rows > 100
    assert any(column.null_expected < 1 for column in found[0].columns)


def test_a_day_on_which_nothing_happened_is_said_to_be_so(offline: OfflineStore) -> None:
    found = checks.day(offline, [ORIGIN], Days.parse("2019-01-02", "2019-01-02").first)
    assert found[0].columns == []
    assert found[0].notes == ["view 'origin': nothing happened on 2019-01-02"]


def test_a_backfill_has_every_known_entity_on_every_day(offline: OfflineStore, tmp_path: Path) -> None:
    days = Days.parse("2013-01-01", "2013-01-03")
    parts = backfill(offline, ORIGIN, days, str(tmp_path / "out"), buckets=2)
    assert len(parts.rows) == 6
    last = pa.concat_tables(
        [pa.parquet.read_table(file, partitioning=None) for file in (tmp_path / "out/day=2013-01-03").iterdir()]
    )
    assert sorted(last["entity_id"].to_pylist()) == ["EWR", "JFK", "LGA"]
    assert set(last["as_of_us"].to_pylist()) == {end_us(days.last)}
    for file in (tmp_path / "out/day=2013-01-03").iterdir():
        number = int(file.stem.partition("=")[2])
        held = pa.parquet.read_table(file, partitioning=None)["entity_id"].to_pylist()
        assert {bucket_of(entity_id, 2) for entity_id in held} <= {number}


def test_a_backfill_that_was_cut_off_goes_on(offline: OfflineStore, tmp_path: Path) -> None:
    days, told = Days.parse("2013-01-01", "2013-01-03"), []
    backfill(offline, ORIGIN, days, str(tmp_path / "out"), buckets=2)
    (tmp_path / "out/day=2013-01-02/bucket=01.parquet").unlink()
    backfill(offline, ORIGIN, days, str(tmp_path / "out"), buckets=2, progress=lambda done, all_: told.append(done))
    assert told == [6]
    assert (tmp_path / "out/day=2013-01-02/bucket=01.parquet").exists()


def test_a_backfill_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="arrivals"):
        backfill(OfflineStore(tmp_path), ORIGIN, Days.parse("2013-01-01", "2013-01-01"), str(tmp_path / "out"))


def test_days_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="the last day must not be before the first"):
        Days.parse("2013-01-02", "2013-01-01")
