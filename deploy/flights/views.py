"""The demonstration's features: how late flights were lately, around everything a flight has a name for."""

from __future__ import annotations

from services.feature.define.definition import Aggregate, Source, View, latest, windowed

_ENTITIES = ("origin", "dest", "carrier", "carrier_origin", "route", "flight_no", "tailnum")

ARRIVALS = Source(
    "arrivals",
    "flights/*.parquet",
    event_us="departs_us",  # as a timetable has it; joining by it is a leak, see deploy/flights/leak.py
    known_us="arrived_us",
    sequence="flight_id",
    entities=_ENTITIES,
    values=("arr_delay", "late"),
)
DEPARTURES = Source(
    "departures",
    "flights/*.parquet",
    event_us="departed_us",
    known_us="departed_us",
    sequence="flight_id",
    entities=_ENTITIES,
    values=("dep_delay", "cancelled"),
)
OBSERVATIONS = Source(
    "observations",
    "weather/*.parquet",
    event_us="observed_us",
    known_us="known_us",
    sequence="sequence",
    entities=("origin",),
    values=("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib"),
)

_HOUR_S, _DAY_S = 3_600.0, 86_400.0


def _delays(entity: str, arrivals: str, departures: str = "", ttl_days: int = 7) -> View:
    """Arrivals over some windows and, where they change fast enough to matter, departures over others.

    arrivals, departures: windows, separated by spaces.
    """
    count, mean, std = Aggregate.COUNT, Aggregate.MEAN, Aggregate.STD
    features = [
        *windowed(ARRIVALS, "arr_delay", (count, mean, std), arrivals.split()),
        *windowed(ARRIVALS, "late", (mean,), arrivals.split()),
        *latest(ARRIVALS, "arr_delay"),
    ]
    if departures:
        features += [
            *windowed(DEPARTURES, "dep_delay", (count, mean), departures.split()),
            *windowed(DEPARTURES, "cancelled", (mean,), departures.split()),
            *latest(DEPARTURES, "dep_delay"),
        ]
    return View(entity, entity, tuple(features), ttl_s=ttl_days * _DAY_S)


VIEWS = (
    _delays("origin", "1h 3h 6h 24h 7d", "1h 3h 6h 24h"),
    _delays("dest", "3h 6h 24h 7d"),
    _delays("carrier", "3h 24h 7d 28d"),
    _delays("carrier_origin", "3h 24h 7d", "3h 24h"),
    _delays("route", "24h 7d 28d"),
    _delays("flight_no", "7d 28d", ttl_days=28),
    _delays("tailnum", "24h 7d 28d", "24h", ttl_days=28),
    View("weather", "origin", latest(OBSERVATIONS, *OBSERVATIONS.plain), ttl_s=6 * _HOUR_S),
)
