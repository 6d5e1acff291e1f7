from __future__ import annotations

import dataclasses

import pytest

from services.feature.definition import (
    Aggregate,
    DefinitionError,
    Feature,
    Source,
    View,
    latest,
    window_us,
    windowed,
)

TRIPS = Source("trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver",), values=("fare", "tip"))


def test_columns_are_named_after_value_aggregate_and_window_in_the_order_given() -> None:
    features = (
        *windowed(TRIPS, "fare", (Aggregate.COUNT, Aggregate.MEAN), ("1h", "7d")),
        *windowed(TRIPS, "", (Aggregate.COUNT,), ("24h",)),
        *latest(TRIPS, "tip"),
    )
    assert View("driver", "driver", features).columns == (
        "fare_count_1h", "fare_mean_1h", "fare_count_7d", "fare_mean_7d", "trips_count_24h", "tip_last", "trips_age_s",
    )  # fmt: skip


def test_a_view_yields_the_schema_that_the_online_store_keeps() -> None:
    view = View("driver", "driver", latest(TRIPS, "fare"), ttl_s=60)
    schema = view.schema()
    assert (schema.name, schema.entity, tuple(schema.columns), schema.ttl_s) == ("driver", "driver", view.columns, 60)


def test_another_window_is_another_schema() -> None:
    day, week = (View("v", "driver", windowed(TRIPS, "fare", (Aggregate.MEAN,), (w,))) for w in ("1d", "7d"))
    assert day.schema().schema_hash != week.schema().schema_hash


@pytest.mark.parametrize(
    ("text", "us"), [("90s", 90_000_000), ("5m", 300_000_000), ("24h", 86_400_000_000), ("7d", 604_800_000_000)]
)
def test_windows_are_a_number_and_a_unit(text: str, us: int) -> None:
    assert window_us(text) == us


@pytest.mark.parametrize("text", ["", "0h", "h", "1.5h", "-1h", "1 h", "1w", "10000d"])
def test_other_windows_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(DefinitionError, match=r"1 to 9999 followed by s, m, h or d, got"):
        window_us(text)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature(TRIPS, Aggregate.MEAN, "fair", "1h"), "'fair_mean_1h': source 'trips' has no value 'fair'.*fare, tip"),
        (Feature(TRIPS, Aggregate.MEAN, "fare"), "'fare_mean': mean must have a window"),
        (Feature(TRIPS, Aggregate.LAST, "fare", "1h"), "'fare_last_1h': last must not have a window"),
        (Feature(TRIPS, Aggregate.MEAN, "fare", "1y"), "'fare_mean_1y': a window must be .* got '1y'"),
        (Feature(TRIPS, Aggregate.STD, "", "1h"), "'trips_std_1h': std needs a value"),
        (Feature(TRIPS, Aggregate.AGE_S, "fare"), "'fare_age_s': age_s is of events, not of a value"),
    ],
)
def test_a_wrong_feature_is_refused_by_view_and_column(feature: Feature, message: str) -> None:
    with pytest.raises(DefinitionError, match=f"view 'driver', column {message}"):
        View("driver", "driver", (feature,))


def test_a_view_about_an_entity_that_its_source_lacks_is_refused() -> None:
    with pytest.raises(DefinitionError, match="view 'v', column 'fare_last': source 'trips' has no entity 'car'"):
        View("v", "car", latest(TRIPS, "fare"))


def test_a_column_cannot_be_there_twice() -> None:
    with pytest.raises(DefinitionError, match="column 'fare_last': it is there twice"):
        View("v", "driver", (*latest(TRIPS, "fare", "fare"),))


def test_two_sources_of_one_name_that_differ_are_refused() -> None:
    other = dataclasses.replace(TRIPS, path="elsewhere/*.parquet")
    with pytest.raises(DefinitionError, match="view 'v', column 'fare_last': another source is also named 'trips'"):
        View("v", "driver", (Feature(TRIPS, Aggregate.LAST, "fare"), Feature(other, Aggregate.LAST, "tip")))


def test_a_view_without_features_or_with_a_negative_ttl_is_refused() -> None:
    with pytest.raises(DefinitionError, match="view 'v': must have at least 1 feature, got 0"):
        View("v", "driver", ())
    with pytest.raises(DefinitionError, match=r"view 'v': ttl_s must be at least 0, got -1"):
        View("v", "driver", latest(TRIPS, "fare"), ttl_s=-1)


@pytest.mark.parametrize("name", ["Fare", "fare; drop", "", "1st", "fa-re"])
def test_names_hold_nothing_that_a_query_could_mistake(name: str) -> None:
    with pytest.raises(DefinitionError, match="a name must match"):
        Source("trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver",), values=(name,))
