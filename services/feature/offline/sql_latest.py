"""LAST, LAST_N, FIRST and AGE_S as SQL: find the one event that answers, then fetch what it says by an equality join.

An event is found by its place: events and boundaries stand in one line per entity, and a running count says how many
events came before each boundary. LAST is the event at that place, FIRST the one after the place of its window's
beginning. DuckDB's own form has those places already: see sql_places.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.feature.define.definition import Aggregate, Feature
from services.feature.offline.sql_events import ENTITIES, MOMENTS, Fragment, Reading, Step, distinct, tile_of


def fragments(reading: Reading) -> Iterator[Fragment]:
    """Everything that one event of the source answers."""
    lasts = [f for f in reading.features if f.aggregate in (Aggregate.LAST, Aggregate.AGE_S)]
    lists = [f for f in reading.features if f.aggregate is Aggregate.LAST_N]
    firsts = [f for f in reading.features if f.aggregate is Aggregate.FIRST]
    if reading.dialect.own_forms:
        yield from _placed(reading, lasts, lists, firsts)
        return
    if lasts or lists:
        latest, steps = _picked(reading, "latest", "t", backward=True)
        yield from _fetched(reading, latest, steps, lasts)
        for number, value in enumerate(distinct(f.value for f in lists)):
            same = [f for f in lists if f.value == value]
            yield _listed(reading, latest, [] if lasts or number else steps, same, number)
    for number, (window_us, step_us) in enumerate(dict.fromkeys((f.window_us, f.step_us) for f in firsts)):
        boundary = f"{tile_of('t', step_us)} - {window_us}" if window_us else str(-(2**62))
        first, steps = _picked(reading, f"first_{number}", boundary, backward=False)
        same = [f for f in firsts if (f.window_us, f.step_us) == (window_us, step_us)]
        yield from _fetched(reading, first, steps, same)


def _picked(reading: Reading, name: str, boundary: str, *, backward: bool) -> tuple[str, list[Step]]:
    """A table with e, t, at_us, seq: the last event before the boundary or the first not before it, known before t."""
    table = reading.table(name)
    return table, [reading.step(step, query) for step, query in _by_place(reading, table, boundary, backward)]


def _by_place(reading: Reading, table: str, boundary: str, backward: bool) -> list[Step]:
    in_order, place = reading.table("in_order", table), reading.table("place", table)
    # at the same microsecond a boundary (0) comes before the events (1), which are not yet known at it
    line = f"""
SELECT e, b, CAST(sum(k) OVER (PARTITION BY e ORDER BY b, k, seq ROWS UNBOUNDED PRECEDING) AS BIGINT) AS nth, k
FROM (
    SELECT e, at_us AS b, 1 AS k, seq FROM {reading.events}
    UNION ALL SELECT DISTINCT e, {boundary}, 0, CAST(0 AS BIGINT) FROM {MOMENTS}
) AS line"""  # noqa: S608
    numbered = f"""
SELECT e, at_us, seq, row_number() OVER (PARTITION BY e ORDER BY at_us, seq) AS nth FROM {reading.events}"""  # noqa: S608
    nth = "p.nth" if backward else "p.nth + 1"
    found = f"""
SELECT m.e, m.t, i.at_us, i.seq
FROM (SELECT e, t, {boundary} AS b FROM {MOMENTS}) AS m
JOIN {place} AS p ON p.e = m.e AND p.b = m.b
JOIN {in_order} AS i ON i.e = m.e AND i.nth = {nth}
WHERE p.k = 0 AND i.at_us < m.t"""  # noqa: S608
    return [(place, line), (in_order, numbered), (table, found)]


def _placed(
    reading: Reading, lasts: Sequence[Feature], lists: Sequence[Feature], firsts: Sequence[Feature]
) -> Iterator[Fragment]:
    """The events are known by their rows in the files."""
    yield from _gathered(reading, "latest", "file_row", lasts)
    latest = f"(SELECT e, t, at_us, seq FROM {reading.places} WHERE file_row IS NOT NULL)"  # noqa: S608
    for number, value in enumerate(distinct(f.value for f in lists)):
        yield _listed(reading, latest, [], [f for f in lists if f.value == value], number)
    for number, window in enumerate(reading.windows):
        same = [f for f in firsts if (f.window_us, f.step_us) == window]
        yield from _gathered(reading, f"first_{number}", f"row_{number}", same)


def _gathered(reading: Reading, name: str, row: str, features: Sequence[Feature]) -> Iterator[Fragment]:
    """row: the column of `places` with the row of each moment's event."""
    values = distinct(f.value for f in features if f.value)
    table = reading.table("fetched", name) if values else reading.places
    steps = []
    if values:
        listed = "".join(f", CAST(r.v{at} AS DOUBLE) AS v{at}" for at in range(len(values)))
        query = (
            f"SELECT p.e, p.t, p.at_us{listed} FROM {{source}} AS r JOIN {reading.places} AS p ON r.file_row = p.{row}"  # noqa: S608
        )
        steps.append(reading.step(table, query, {f"v{at}": value for at, value in enumerate(values)}))
    if features:
        yield Fragment(steps, table, {f.name: _answer(f, table, values) for f in features})


def _fetched(reading: Reading, picked: str, steps: Sequence[Step], features: Sequence[Feature]) -> Iterator[Fragment]:
    """The values of the events that were picked, read again from the source: most of it was never needed."""
    if not features:
        return
    values = distinct(f.value for f in features if f.value)
    table, steps = picked, list(steps)
    if values:
        table = f"fetched_{picked}"
        listed = "".join(f", CAST(r.v{at} AS DOUBLE) AS v{at}" for at in range(len(values)))
        query = f"""
SELECT p.e, p.t, p.at_us{listed}
FROM {{source}} AS r
JOIN (SELECT {picked}.*, entities.entity_id FROM {picked} JOIN {ENTITIES} ON entities.e = {picked}.e) AS p
ON r.seq = p.seq AND r.at_us = p.at_us AND r.entity_id = p.entity_id"""  # noqa: S608
        steps.append(reading.step(table, query, {f"v{at}": value for at, value in enumerate(values)}))
    yield Fragment(steps, table, {f.name: _answer(f, table, values) for f in features})


def _answer(feature: Feature, table: str, values: Sequence[str]) -> str:
    if feature.aggregate is Aggregate.AGE_S:
        return f"({table}.t - {table}.at_us) / 1e6"
    value = f"{table}.v{values.index(feature.value)}"
    if feature.aggregate is Aggregate.LAST and feature.window:
        return f"CASE WHEN {table}.at_us >= {table}.t - {feature.window_us} THEN {value} END"
    return value


def _listed(reading: Reading, latest: str, steps: Sequence[Step], features: Sequence[Feature], number: int) -> Fragment:
    """Every event with those before it beside it: what the latest event has there is the answer."""
    history, table = reading.table("history", number), reading.table("listed", number)
    value, most = reading.values.index(features[0].value), max(int(f.parameter) for f in features)
    in_order = "OVER (PARTITION BY e ORDER BY at_us, seq)"
    lags = "".join(f", lag(v{value}, {i}) {in_order} AS x{i}, lag(at_us, {i}) {in_order} AS a{i}" for i in range(most))
    with_lags = f"SELECT e, at_us, seq{lags} FROM {reading.events}"  # noqa: S608
    query = f"""
SELECT p.t, h.* FROM {history} AS h JOIN {latest} AS p ON h.e = p.e AND h.at_us = p.at_us AND h.seq = p.seq"""  # noqa: S608
    columns = {}
    for feature in features:
        for at, column in enumerate(feature.columns):
            recent = f"{table}.a{at} >= {table}.t - {feature.window_us}" if feature.window else "1 = 1"
            columns[column] = f"CASE WHEN {recent} THEN {table}.x{at} END"
    return Fragment([*steps, reading.step(history, with_lags), reading.step(table, query)], table, columns)
