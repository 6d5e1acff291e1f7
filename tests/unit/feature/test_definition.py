from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.feature.define.definition import (
    Aggregate,
    DefinitionError,
    Feature,
    RequestView,
    Source,
    Value,
    View,
    last_n,
    latest,
    quantile,
    top_k,
    windowed,
)
from services.feature.define.definitions import Definitions, load
from services.feature.define.windows import WindowError, length_us, resolution_us

TRIPS = Source(
    "trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver",),
    values=("fare", "tip", Value("share", "tip / fare")), labels=("city",), where="fare >= 0",
)  # fmt: skip


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


def test_an_aggregate_that_is_a_list_has_a_column_per_place() -> None:
    features = (
        last_n(TRIPS, "fare", 2, "1h"),
        top_k(TRIPS, "city", 2),
        quantile(TRIPS, "fare", 0.9, "7d"),
        quantile(TRIPS, "fare", 0.999),
        *windowed(TRIPS, "share", (Aggregate.SUM,), ("",), default=0.0),
    )
    view = View("driver", "driver", features)
    assert view.columns == (
        "fare_last_1_1h", "fare_last_2_1h", "city_top_1", "city_top_2", "fare_p90_7d", "fare_p99_9", "share_sum",
    )  # fmt: skip
    assert view.defaults == (None,) * 6 + (0.0,)


@pytest.mark.parametrize(
    ("text", "us"), [("90s", 90_000_000), ("5m", 300_000_000), ("24h", 86_400_000_000), ("7d", 604_800_000_000)]
)
def test_windows_are_a_number_and_a_unit(text: str, us: int) -> None:
    assert length_us(text) == us


@pytest.mark.parametrize("text", ["", "0h", "h", "1.5h", "-1h", "1 h", "1w", "10000d"])
def test_other_windows_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(WindowError, match=r"1 to 9999 followed by s, m, h or d, got"):
        length_us(text)


@pytest.mark.parametrize(
    ("window", "resolution", "step"),
    [("5s", "", "1s"), ("1m", "", "1s"), ("1h", "", "5m"), ("3h", "", "5m"), ("24h", "", "1h"), ("7d", "", "1h"),
     ("28d", "", "1d"), ("7d", "1d", "1d"), ("90s", "30s", "30s")],
)  # fmt: skip
def test_a_window_has_the_coarsest_step_that_gives_it_twelve_or_the_one_it_is_given(
    window: str, resolution: str, step: str
) -> None:
    assert resolution_us(window, resolution) == length_us(step)


@pytest.mark.parametrize(("window", "resolution"), [("1h", "7m"), ("1h", "2h"), ("7d", "1s")])
def test_a_step_that_does_not_fit_its_window_is_refused(window: str, resolution: str) -> None:
    with pytest.raises(WindowError, match=f"'{window}'"):
        resolution_us(window, resolution)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature(TRIPS, Aggregate.MEAN, "fair", "1h"), "'fair_mean_1h': source 'trips' has no value 'fair'.*fare, tip"),
        (Feature(TRIPS, Aggregate.MEAN, "city"), "'city_mean': source 'trips' has no value 'city'"),
        (
            Feature(TRIPS, Aggregate.DISTINCT, "fare"),
            "'fare_distinct': source 'trips' has no label 'fare'.*: city",
        ),
        (Feature(TRIPS, Aggregate.MEAN, "fare", "1y"), "'fare_mean_1y': a window must be .* got '1y'"),
        (Feature(TRIPS, Aggregate.MEAN, "fare", "1h", "7m"), "'fare_mean_1h': a resolution must divide .* got '7m'"),
        (Feature(TRIPS, Aggregate.LAST, "fare", "1h", "5m"), "'fare_last_1h': last without steps takes no resolution"),
        (Feature(TRIPS, Aggregate.STD, "", "1h"), "'trips_std_1h': std needs a value"),
        (Feature(TRIPS, Aggregate.AGE_S, "fare"), "'fare_age_s': age_s is of events, and of all time, got 'fare'"),
        (Feature(TRIPS, Aggregate.MEAN, "fare", parameter=2), "'fare': mean takes no parameter, got 2"),
        (Feature(TRIPS, Aggregate.LAST_N, "fare", parameter=0), "'fare': last_n needs a whole parameter from 1 to 64"),
        (Feature(TRIPS, Aggregate.LAST_N, "fare", parameter=2.5), "'fare': last_n needs a whole parameter .* got 2.5"),
        (Feature(TRIPS, Aggregate.TOP_K, "city", parameter=17), "'city': top needs a whole parameter from 1 to 16"),
        (Feature(TRIPS, Aggregate.QUANTILE, "fare", parameter=1.1), "'fare': a quantile needs a parameter from 0 to 1"),
    ],
)
def test_a_wrong_feature_is_refused_by_view_and_column(feature: Feature, message: str) -> None:
    with pytest.raises(DefinitionError, match=f"view 'driver', column {message}"):
        View("driver", "driver", (feature,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"where": "fair > 1"}, "source 'trips', where: .*fair"),
        ({"where": "fare + 1"}, "source 'trips', where: "),
        ({"values": ("fare", Value("half", "tip / 2"))}, "source 'trips', value 'half': .*tip"),
        ({"labels": ("driver",)}, "source 'trips': column 'driver' is there twice"),
        ({"entities": ()}, "source 'trips': must have at least 1 entity, got 0"),
        ({"path": "it's.parquet"}, "source 'trips': path must be a glob without quotes"),
    ],
)
def test_a_wrong_source_is_refused_by_its_name(changed: dict[str, object], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        dataclasses.replace(TRIPS, **changed)  # type: ignore[arg-type]


def test_a_fingerprint_changes_with_what_a_view_means() -> None:
    view = View("v", "driver", latest(TRIPS, "fare"))
    others = [
        dataclasses.replace(view, stream=True),
        View("v", "driver", latest(dataclasses.replace(TRIPS, where="fare > 0"), "fare")),
        View("v", "driver", (Feature(TRIPS, Aggregate.LAST, "fare", default=1.0), *latest(TRIPS))),
    ]
    assert len({view.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert view.fingerprint() == View("v", "driver", latest(TRIPS, "fare")).fingerprint()


DRIVER = View("driver", "driver", latest(TRIPS, "fare"))


def test_a_request_view_may_read_its_inputs_and_stored_columns_and_nothing_else() -> None:
    fine = RequestView("ask", ("km",), (Value("per_km", "driver.fare_last / input.km"),))
    assert [expression.columns for expression in fine.expressions([DRIVER])] == [("driver.fare_last", "input.km")]
    wrong = RequestView("ask", ("km",), (Value("per_km", "driver.tip_last / input.km"),))
    with pytest.raises(DefinitionError, match=r"request view 'ask', column 'per_km': .*tip_last"):
        wrong.expressions([DRIVER])


def test_definitions_have_names_of_their_own_and_one_meaning_per_source() -> None:
    with pytest.raises(DefinitionError, match="view 'driver': it is there twice"):
        Definitions([DRIVER], [RequestView("driver", (), (Value("one", "1"),))])
    other = View("v", "driver", latest(dataclasses.replace(TRIPS, where=""), "fare"))
    with pytest.raises(DefinitionError, match="view 'v': another source is also named 'trips'"):
        Definitions([DRIVER, other])
    with pytest.raises(DefinitionError, match="there is no view 'car'; there are: driver"):
        Definitions([DRIVER]).view("car")


MODULE = """from services.feature.define.definition import *
TRIPS = Source("trips", "*.parquet", "at_us", "at_us", "seq", entities=("driver",), values=("fare",))
VIEWS = (View("driver", "driver", latest(TRIPS, "fare")),)
"""


def test_definitions_are_loaded_from_a_file_and_mistakes_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "views.py"
    path.write_text(MODULE)
    assert [view.name for view in load(str(path)).views] == ["driver"]
    path.write_text(MODULE.replace('TRIPS, "fare")', 'TRIPS, "fair")'))
    with pytest.raises(DefinitionError, match=r"views\.py:3: view 'driver', column 'fair_last'"):
        load(str(path))
    path.write_text("A = (")
    with pytest.raises(DefinitionError, match=r"views\.py"):
        load(str(path))
    path.write_text("A = 1")
    with pytest.raises(DefinitionError, match="must have VIEWS"):
        load(str(path))
    with pytest.raises(DefinitionError, match=r"there is no such file: .*absent\.py"):
        load(str(tmp_path / "absent.py"))


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
