from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import pytest

from services.feature.check import checks, replay
from services.feature.define.definition import Aggregate, RequestView, Source, Value, View, latest, windowed
from services.feature.define.definitions import Definitions
from services.feature.define.events import Events
from services.feature.define.expression import Expression
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


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("l.csv", "", "must have at least 1 row, got an empty file"),
        ("l.csv", "origin,at\n", "must have at least 1 row, got 0"),
        ("l.csv", "origin,at\nJFK,1e3\n", "column 'at': must be a timestamp or int64 microseconds, got double"),
        ("l.csv", "origin,at\nJFK,-5\n", r"a moment must be 0 to 2\*\*53 microseconds since 1970, got -5"),
        ("gone.parquet", None, "there is no such file"),
    ],
)
def test_labels_without_a_row_or_a_moment_are_refused(
    offline: OfflineStore, tmp_path: Path, file: str, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(LabelsError, match=told):
        training_set(offline, Labels(str(tmp_path / file), "at", {}), Wanted([ORIGIN]), str(tmp_path / "out"))


def test_an_entity_that_no_view_is_about_is_a_mistake(offline: OfflineStore, labels: Labels, tmp_path: Path) -> None:
    wrong = Labels(labels.path, labels.time, {"origin": "airport", "orign": "airport"})
    with pytest.raises(LabelsError, match="no view that is joined is about entity 'orign', they are about: origin"):
        training_set(offline, wrong, Wanted([ORIGIN]), str(tmp_path / "out"))


def test_an_input_that_is_no_number_is_refused_by_column(offline: OfflineStore, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"origin,at,slack_min\nJFK,{NOON_US},soon\n")
    with pytest.raises(LabelsError, match="column 'slack_min': must be a number, got string"):
        training_set(
            offline, Labels(str(tmp_path / "l.csv"), "at", {}), Wanted([ORIGIN], [BUFFER]), str(tmp_path / "o")
        )


def test_ids_in_csv_are_text_even_if_they_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "offline/arrivals").mkdir(parents=True)
    table = pa.table({"due_us": [NOON_US], "arrived_us": [NOON_US], "seq": [1], "origin": ["007"], "delay": [3.0]})
    pa.parquet.write_table(table, tmp_path / "offline/arrivals/a.parquet")
    (tmp_path / "l.csv").write_text(f"origin,at\n007,{NOON_US + 1}\n7,{NOON_US + 1}\n")
    known: list[tuple[str, int, int]] = []
    training_set(
        OfflineStore(tmp_path / "offline"),
        Labels(str(tmp_path / "l.csv"), "at", {}),
        Wanted([ORIGIN]),
        str(tmp_path / "out"),
        known=lambda *told: known.append(told),
    )
    assert read(tmp_path / "out")["origin.delay_last"].to_pylist() == [3.0, None]
    assert known == [("origin", 1, 2)]


def test_moments_without_a_zone_are_in_utc_and_others_where_they_say(offline: OfflineStore, tmp_path: Path) -> None:
    at_us = NOON_US + 2 * DAY_US
    rows = []
    for zone in (None, "UTC", "America/New_York"):
        table = pa.table({"origin": ["JFK"], "at": pa.array([at_us], pa.timestamp("us", zone))})
        pa.parquet.write_table(table, tmp_path / "l.parquet")
        out = tmp_path / f"out-{zone and zone[:2]}"
        training_set(offline, Labels(str(tmp_path / "l.parquet"), "at", {}), Wanted([ORIGIN]), str(out))
        rows.append(read(out).drop(["at"]).to_pylist())
    assert rows[0][0]["origin.delay_count_6h"] is not None
    assert rows[0] == rows[1] == rows[2]


def test_a_training_set_cannot_go_where_a_file_is(offline: OfflineStore, labels: Labels, tmp_path: Path) -> None:
    with pytest.raises(PartsError, match="is no folder"):
        training_set(offline, labels, Wanted([ORIGIN]), labels.path)


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


def test_features_on_request_are_checked_row_by_row_against_sql(offline: OfflineStore) -> None:
    day = Days.parse("2013-01-02", "2013-01-02").first
    found = {one.path: one for one in checks.day(offline, [ORIGIN], day, [BUFFER], rows=100)}[checks.ON_REQUEST]
    assert found.agrees
    (column,) = found.columns
    assert (column.view, column.column, column.rows) == ("buffer", "left", 500)
    assert 0 < column.null_expected < 1


def test_a_request_view_that_numpy_has_otherwise_is_found(
    offline: OfflineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Expression.evaluate

    def wrong(self: Expression, columns: Any) -> Any:
        values, null = evaluate(self, columns)
        return values + 1.0, null

    monkeypatch.setattr(Expression, "evaluate", wrong)
    day = Days.parse("2013-01-02", "2013-01-02").first
    found = {one.path: one for one in checks.day(offline, [ORIGIN], day, [BUFFER], rows=100)}[checks.ON_REQUEST]
    assert not found.agrees


def test_the_check_of_a_training_set_looks_at_request_views_too(
    offline: OfflineStore, labels: Labels, tmp_path: Path
) -> None:
    training_set(offline, labels, Wanted([ORIGIN], [BUFFER]), str(tmp_path / "out"))
    definitions = Definitions((ORIGIN,), (BUFFER,))
    honest = checks.training(offline, definitions, str(tmp_path / "out"))
    assert honest.agrees
    assert [column.rows for column in honest.columns if column.view == "buffer"] == [80]
    file = tmp_path / "out/part-00000.parquet"
    table = pa.parquet.read_table(file)
    at = table.column_names.index("buffer.left")
    other = pc.add(table["buffer.left"], pa.scalar(1.0, pa.float32()))
    pa.parquet.write_table(table.set_column(at, "buffer.left", other), file)
    tampered = checks.training(offline, definitions, str(tmp_path / "out"))
    assert [column.view for column in tampered.columns if column.mismatched] == ["buffer"]


def test_moments_lie_on_both_sides_of_where_windows_let_go_of_events(offline: OfflineStore) -> None:
    begin_us = end_us(Days.parse("2013-01-01", "2013-01-01").first)
    random = np.random.default_rng(0)
    events = replay.events_of(offline, ORIGIN, begin_us, random)
    moments = set(replay.sampled(ORIGIN, events, begin_us, 4_000, random).as_of_us.tolist())
    for window, step in {(f.window_us, f.step_us) for f in ORIGIN.features if f.window}:
        left = (events[0].known_us // step + window // step + 1) * step
        left = left[(left > begin_us) & (left < begin_us + DAY_US)]
        assert len(left)
        assert moments >= {*left.tolist(), *(left - 1).tolist()}


def test_requests_get_fewer_where_each_counts_very_many_events() -> None:
    n = 600_000
    times = np.arange(n, dtype=np.int64)
    events = Events("arrivals", times, times, times, {"origin": ["JFK", "EWR"] * (n // 2)}, {}, {})
    assert replay.affordable([events], "origin", 200) == 20
    assert replay.affordable([events.take(times[:100])], "origin", 200) == 200


def test_a_day_on_which_nothing_happened_is_said_to_be_so(offline: OfflineStore) -> None:
    found = checks.day(offline, [ORIGIN], Days.parse("2019-01-02", "2019-01-02").first)
    assert found[0].columns == []
    assert not found[0].agrees  # nothing was compared
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
