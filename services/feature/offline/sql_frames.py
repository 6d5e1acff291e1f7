"""COUNT, SUM, MEAN, STD, MIN and MAX in DuckDB's own form: windows as frames over the events themselves.

Where a window begins and ends is known: see sql_places.py. Events stand at their places, moments after all of them,
and each moment's windows are ROWS frames that reach back to the events in them; the engine's own trees of partial
aggregates answer all of a source's windows in one pass. Nothing is ever subtracted but counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.feature.define.definition import Aggregate, Feature
from services.feature.offline.sql_events import Fragment, Reading

_FRAMED = {
    Aggregate.SUM: "sum",
    Aggregate.MEAN: "sum",
    Aggregate.STD: "var_pop",
    Aggregate.MIN: "min",
    Aggregate.MAX: "max",
}


def fragments(reading: Reading, features: Sequence[Feature]) -> Iterator[Fragment]:
    counts = [f for f in features if f.aggregate is Aggregate.COUNT]
    framed = [f for f in features if f.aggregate in _FRAMED]
    if counts:
        yield Fragment([], reading.places, {f.name: _count(reading, f) for f in counts})
    if framed:
        table = reading.table("framed")
        query = _query(reading, framed)
        yield Fragment([reading.step(table, query)], table, {f.name: _answer(reading, f, table) for f in framed})


def _query(reading: Reading, features: Sequence[Feature]) -> str:
    found = {_column(reading, f): _aggregated(reading, f) for f in features}
    values = [f"f{at}" for at in sorted({_value(reading, f) for f in features})]
    lows = [f"low_{w}" for w in sorted({_window(reading, f) for f in features})]
    nothing = "CAST(NULL AS BIGINT)"
    events = ["p.place AS pos", f"{nothing} AS e", f"{nothing} AS t", "p.place AS past"]
    events += [*(f"p.place AS {low}" for low in lows), *(f"v.{value}" for value in values)]
    moments = ["pos", "e", "t", "past", *lows, *("NULL" for _ in values)]
    return f"""
SELECT e, t, {", ".join(found)} FROM (
    SELECT e, t, {", ".join(f"{expression} AS {column}" for column, expression in found.items())}
    FROM (
        SELECT {", ".join(events)}
        FROM placed_{reading.places} AS p JOIN {reading.events} AS v ON v.file_row = p.file_row
        UNION ALL SELECT {", ".join(moments)} FROM {reading.places}
    ) AS line
) AS framed
WHERE e IS NOT NULL"""  # noqa: S608


def _aggregated(reading: Reading, feature: Feature) -> str:
    name = _FRAMED[feature.aggregate]
    total = reading.dialect.total if name == "sum" else name
    frame = f"pos - low_{_window(reading, feature)} PRECEDING AND pos - past + 1 PRECEDING"
    return f"{total}(f{_value(reading, feature)}) OVER (ORDER BY pos ROWS BETWEEN {frame})"


def _answer(reading: Reading, feature: Feature, table: str) -> str:
    found = f"{table}.{_column(reading, feature)}"
    if feature.aggregate is Aggregate.SUM:
        return f"coalesce({found}, 0)"
    if feature.aggregate is Aggregate.MEAN:
        return f"{found} / nullif({_count(reading, feature)}, 0)"
    return f"sqrt({found})" if feature.aggregate is Aggregate.STD else found


def _count(reading: Reading, feature: Feature) -> str:
    """Of values that take part, or of events."""
    w = _window(reading, feature)
    if feature.value:
        return f"{reading.places}.n{_value(reading, feature)}_{w}"
    return f"({reading.places}.past - {reading.places}.low_{w})"


def _column(reading: Reading, feature: Feature) -> str:
    return f"{_FRAMED[feature.aggregate]}_{_value(reading, feature)}_{_window(reading, feature)}"


def _value(reading: Reading, feature: Feature) -> int:
    return reading.values.index(feature.value)


def _window(reading: Reading, feature: Feature) -> int:
    return reading.windows.index((feature.window_us, feature.step_us))
