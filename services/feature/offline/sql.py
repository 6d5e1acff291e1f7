"""Definitions compiled to SQL: from events and a spine to one row of features per spine row.

Three shapes only, which mean the same on every engine:

    GROUP BY    of tiles and their items
    windows     RANGE frames of constant length over int64 times, or ROWS frames over a total order
    equality    joins by entity, time and sequence; what answers is found first, by its place in a total order

sql_tiles.py, sql_latest.py and sql_sketches.py compile the aggregates, sql_events.py what they read.

On DuckDB, in this process, places in the order of events are found by binary search in numpy (sql_places.py), and
numbers are aggregated over ROWS frames between them (sql_frames.py): the same meaning, several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from services.feature.define.clock import Clock
from services.feature.define.definition import Source, View
from services.feature.define.expression import Kind
from services.feature.offline import sql_latest, sql_sketches, sql_tiles
from services.feature.offline.sql_events import (
    BIGQUERY,
    DUCKDB,
    ENTITIES,
    MOMENTS,
    PORTABLE,
    SPARK,
    Dialect,
    Fragment,
    Reading,
    RelationOf,
    Step,
)

__all__ = [
    "BIGQUERY",
    "DUCKDB",
    "PORTABLE",
    "SPARK",
    "SPINE",
    "Clock",
    "Dialect",
    "Program",
    "known_entities",
    "needed",
    "program",
]

SPINE = "spine"
"""The table that must exist: row_id BIGINT, entity_id VARCHAR (null for none), as_of_us BIGINT."""


@dataclass(frozen=True, slots=True)
class Program:
    """steps: temporary tables to create, in this order. rows: the last query.

    rows has row_id, and c0, c1, ... DOUBLE for the view's columns, in any order of rows; entities that nothing was
    known of are absent. places: DuckDB's own forms only: tables among the steps that `sql_places.find` makes of the
    step's query and of this one.
    """

    steps: Sequence[Step]
    rows: str
    places: Mapping[str, str] = field(default_factory=dict)


def program(view: View, relation_of: RelationOf, dialect: Dialect = DUCKDB, clock: Clock = Clock.KNOWN) -> Program:
    """A view's features for every row of the spine."""
    readings = [
        Reading(number, view, source, relation_of(source), dialect, clock) for number, source in enumerate(view.sources)
    ]
    steps = [(name, dialect.write(query)) for name, query in _asked()]
    fragments: list[Fragment] = []
    for reading in readings:
        steps += [*reading.steps(), *([] if dialect.own_forms else [_begun(reading)])]
        for compiled in (sql_tiles, sql_latest, sql_sketches):
            fragments += compiled.fragments(reading)
    steps += [step for fragment in fragments for step in fragment.steps]
    places = {reading.places: reading.moments() for reading in readings} if dialect.own_forms else {}
    return Program(steps, dialect.write(_rows(view, readings, fragments)), places)


def needed(view: View, source: Source, clock: Clock = Clock.KNOWN) -> dict[str, Kind | None]:
    """The source's own columns that the view reads; None for those that order its events."""
    names = [view.entity, *(f.value for f in view.of(source) if f.value)]
    made = {value.name: source.expression(value) for value in source.made if value.name in names}
    read = [*(made.values()), *filter(None, [source.condition()])]
    kinds = {name: source.columns[name] for name in names if name not in made}
    kinds |= {name: source.columns[name] for expression in read for name in expression.columns}
    keys = {source.known_us, source.sequence, source.event_us if clock is Clock.EVENT else source.known_us}
    return kinds | dict.fromkeys(sorted(keys))


def known_entities(view: View, source: Source, relation: str, moment_us: int) -> str:
    """A query for the entities of events that were known before the moment: id and at_us; DuckDB's."""
    reading = Reading(0, view, source, relation, DUCKDB, Clock.KNOWN)
    return f"SELECT entity_id AS id, at_us FROM {reading.selected({})} AS events WHERE at_us < {moment_us}"  # noqa: S608


def _asked() -> Iterator[Step]:
    ids = f"SELECT DISTINCT entity_id FROM {SPINE} WHERE entity_id IS NOT NULL"  # noqa: S608
    yield ENTITIES, f"SELECT entity_id, row_number() OVER (ORDER BY entity_id) AS e FROM ({ids}) AS ids"  # noqa: S608
    asked = f"SELECT s.row_id, n.e, s.as_of_us AS t FROM {SPINE} AS s"  # noqa: S608
    yield "asked", f"{asked} JOIN {ENTITIES} AS n ON n.entity_id = s.entity_id"
    yield MOMENTS, "SELECT DISTINCT e, t FROM asked"


def _begun(reading: Reading) -> Step:
    """Since when anything is known of an entity."""
    query = f"SELECT e, min(at_us) AS begun_us FROM {reading.events} GROUP BY e"  # noqa: S608
    return reading.step(_begun_table(reading), query)


def _begun_table(reading: Reading) -> str:
    return reading.table("begun")


def _rows(view: View, readings: Sequence[Reading], fragments: Sequence[Fragment]) -> str:
    found = {column: expression for fragment in fragments for column, expression in fragment.columns.items()}
    columns = ["asked.row_id"]
    columns += [f"CAST({found[column]} AS DOUBLE) AS c{at}" for at, column in enumerate(view.columns)]
    tables = [fragment.table for fragment in fragments]
    if readings[0].dialect.own_forms:
        joins, tables = [], [*(reading.places for reading in readings), *tables]
        known = " OR ".join(f"{reading.places}.file_row IS NOT NULL" for reading in readings)
    else:
        begun = [_begun_table(reading) for reading in readings]
        joins = [f"LEFT JOIN {table} ON {table}.e = asked.e" for table in begun]
        known = " OR ".join(f"{table}.begun_us < asked.t" for table in begun)
    for table in dict.fromkeys(tables):
        # the running totals of a tile also end where no moment is
        moment = f" AND {table}.k = 0" if table.startswith("running") else ""
        joins.append(f"LEFT JOIN {table} ON {table}.e = asked.e AND {table}.t = asked.t{moment}")
    return "\n".join([f"SELECT {', '.join(columns)}", "FROM asked", *joins, f"WHERE {known}"])
