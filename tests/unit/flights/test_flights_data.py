from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from deploy.flights import data


@pytest.fixture(scope="module")
def flights(all_events: Path) -> duckdb.DuckDBPyRelation:
    return duckdb.read_parquet(str(all_events / "flights" / "*.parquet"))


def one(flights: duckdb.DuckDBPyRelation, expression: str, where: str = "true") -> object:
    (row,) = flights.filter(where).aggregate(expression).fetchall()
    return row[0] if len(row) == 1 else row


def test_every_flight_of_the_year_is_there_once(flights: duckdb.DuckDBPyRelation) -> None:
    assert one(flights, "count(*), count(DISTINCT flight_id), min(flight_id), max(flight_id)") == (
        336_776, 336_776, 1, 336_776,
    )  # fmt: skip


def test_sequence_follows_the_schedule(flights: duckdb.DuckDBPyRelation) -> None:
    assert one(flights.project("departs_us - lag(departs_us) OVER (ORDER BY flight_id) AS step"), "min(step)") == 0


def test_a_prediction_is_asked_for_two_hours_before_the_scheduled_departure(flights: duckdb.DuckDBPyRelation) -> None:
    assert one(flights, "min(departs_us - predict_at_us), max(departs_us - predict_at_us)") == (7_200_000_000,) * 2


def test_the_first_flight_has_its_utc_times_and_outcome(flights: duckdb.DuckDBPyRelation) -> None:
    # 2013-01-01, scheduled 05:15 in New York (10:15 UTC), left 2 minutes late, flew 227 minutes, 11 minutes late
    found = one(flights, "min(departs_us), min(departed_us), min(arrived_us), min(arr_delay), min(late)",
                "flight_no = 'UA1545' AND departs_us < 1357040000000000")  # fmt: skip
    assert found == (1_357_035_300_000_000, 1_357_035_420_000_000, 1_357_035_420_000_000 + 252 * 60_000_000, 11.0, 0.0)


def test_outcomes_are_known_after_departures_and_a_cancellation_at_the_schedule(
    flights: duckdb.DuckDBPyRelation,
) -> None:
    assert one(flights, "count(*)", "arrived_us < departed_us") == 0
    assert one(flights, "count(*)", "cancelled = 1 AND arrived_us <> departs_us") == 0
    assert (
        one(flights, "count(*)", "arr_delay IS NULL AND cancelled = 0 AND arrived_us < departed_us + 21600000000") == 0
    )


def test_late_is_15_minutes_or_more_cancelled_or_diverted(flights: duckdb.DuckDBPyRelation) -> None:
    assert one(flights, "min(late)", "arr_delay >= 15 OR arr_delay IS NULL") == 1
    assert one(flights, "max(late)", "arr_delay < 15") == 0


def test_weather_becomes_known_an_hour_after_it_was_observed(all_events: Path) -> None:
    weather = duckdb.read_parquet(str(all_events / "weather" / "*.parquet"))
    assert one(weather, "count(*), min(known_us - observed_us), max(known_us - observed_us)") == (
        26_115, 3_600_000_000, 3_600_000_000,
    )  # fmt: skip


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PACKAGE", "nycflights_that_never_was")
    with pytest.raises(data.DataError, match="nycflights_that_never_was: install tenfold with its extra 'flights'"):
        data.package_version()
