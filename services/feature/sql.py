"""Definitions compiled to SQL: from events and a spine to one row of features per spine row.

Only shapes that mean the same on every engine are used: running sums over ROWS in a total order, and equality joins.
Per source:

    history   every event with its place in its entity's history, and running sums up to and including it
    place     for every (entity, moment): how many events were known before it, and before each window began
    features  what was known before the moment, less what was known before the window: two equality joins

A running sum ends at a place that the moment fixes, and places follow (known_us, sequence); so an event that becomes
known later can change nothing, not even the last bit.

Names come from definitions, which allow no character that SQL could mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from services.feature.definition import Aggregate, Feature, Source, View, window_us

RelationOf = Callable[[Source], str]
"""What stands in FROM for a source, for example "read_parquet('flights/*.parquet')"."""

SPINE = "spine"
"""The table that must exist: row_id BIGINT, entity_id VARCHAR (null for none), as_of_us BIGINT."""

# a value that is not finite would stay in every running sum after it
_FINITE = "BETWEEN -1e300 AND 1e300"


def steps(view: View, relation_of: RelationOf) -> list[tuple[str, str]]:
    """Temporary tables to create, in this order: (name, query)."""
    moments = f"SELECT DISTINCT entity_id, as_of_us FROM {SPINE} WHERE entity_id IS NOT NULL"  # noqa: S608
    tables = [("moments", moments)]
    for part in _parts(view):
        tables.append((part.history, _history(part, view.entity, relation_of(part.source))))
        tables.append((part.place, _place(part)))
    return tables


def features(view: View) -> str:
    """The last query: row_id and the view's columns as DOUBLE, in any order; entities never heard of are absent."""
    parts = {part.source.name: part for part in _parts(view)}
    columns = [f"{_column(feature, parts[feature.source.name])} AS {feature.name}" for feature in view.features]
    known = " OR ".join(f"{part.place}.before > 0" for part in parts.values())
    return "\n".join(
        [
            f"SELECT {SPINE}.row_id,",
            ",\n".join(columns),
            f"FROM {SPINE}",
            *(join for part in parts.values() for join in _joins(part)),
            f"WHERE {known}",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What a view takes from one source."""

    number: int
    source: Source
    features: Sequence[Feature]

    @property
    def history(self) -> str:
        return f"history_{self.number}"

    @property
    def place(self) -> str:
        return f"place_{self.number}"

    @property
    def windows(self) -> Sequence[str]:
        return _distinct(feature.window for feature in self.features if feature.window)

    @property
    def summed(self) -> Sequence[str]:
        """Values that are aggregated over windows."""
        return _distinct(feature.value for feature in self.features if feature.window and feature.value)

    @property
    def kept(self) -> Sequence[str]:
        """Values whose last one is wanted."""
        return _distinct(feature.value for feature in self.features if feature.aggregate is Aggregate.LAST)

    def at(self, window: str = "") -> str:
        """The alias of the history as of the moment, or as of the beginning of a window."""
        return f"{self.history}_{window}" if window else f"{self.history}_now"


def _parts(view: View) -> list[_Part]:
    return [
        _Part(number, source, [feature for feature in view.features if feature.source.name == source.name])
        for number, source in enumerate(view.sources)
    ]


def _distinct(names: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(names))


def _before(window: str = "") -> str:
    return f"before_{window}" if window else "before"


def _history(part: _Part, entity: str, relation: str) -> str:
    source = part.source
    in_order = f"PARTITION BY entity_id ORDER BY known_us, {source.sequence}"
    so_far = f"OVER ({in_order} ROWS UNBOUNDED PRECEDING)"
    events = [f"{entity} AS entity_id", f"{source.known_us} AS known_us", source.sequence]
    events += [
        f"CASE WHEN {value} {_FINITE} THEN CAST({value} AS DOUBLE) END AS {value}"
        for value in _distinct([*part.summed, *part.kept])
    ]
    # sums are of differences to the entity's first value: the squares of large, close numbers would cancel
    pivots = [f"coalesce(first_value({value} IGNORE NULLS) {so_far}, 0) AS pivot_{value}" for value in part.summed]
    columns = ["entity_id", "known_us", f"row_number() OVER ({in_order}) AS nth"]
    columns += [f"{value} AS last_{value}" for value in part.kept]
    for value in part.summed:
        off = f"({value} - pivot_{value})"
        columns += [
            f"pivot_{value}",
            f"count({value}) {so_far} AS n_{value}",
            f"coalesce(sum({off}) {so_far}, 0) AS sum_{value}",
            f"coalesce(sum({off} * {off}) {so_far}, 0) AS squares_{value}",
        ]
    return f"""
WITH events AS (
    SELECT {", ".join(events)}
    FROM {relation}
    WHERE {entity} IN (SELECT entity_id FROM moments)
), pivoted AS (
    SELECT {", ".join(["*", *pivots])} FROM events
)
SELECT {", ".join(columns)} FROM pivoted"""  # noqa: S608


def _place(part: _Part) -> str:
    offsets = {window: window_us(window) if window else 0 for window in ("", *part.windows)}
    befores = [f"max(CASE WHEN offset_us = {us} THEN before END) AS {_before(w)}" for w, us in offsets.items()]
    # at the same microsecond a boundary (0) comes before the events (1), which are not yet known at it
    return f"""
WITH line AS (
    SELECT entity_id, known_us AS at_us, 1 AS is_event, 0 AS as_of_us, 0 AS offset_us FROM {part.history}
    UNION ALL
    SELECT entity_id, as_of_us - offset_us, 0, as_of_us, offset_us
    FROM moments CROSS JOIN (VALUES {", ".join(f"({us})" for us in offsets.values())}) AS boundaries (offset_us)
), counted AS (
    SELECT entity_id, as_of_us, offset_us, is_event, CAST(sum(is_event) OVER (
        PARTITION BY entity_id ORDER BY at_us, is_event ROWS UNBOUNDED PRECEDING) AS BIGINT) AS before
    FROM line
)
SELECT entity_id, as_of_us, {", ".join(befores)}
FROM counted WHERE is_event = 0 GROUP BY entity_id, as_of_us"""  # noqa: S608


def _joins(part: _Part) -> list[str]:
    """The places of a spine row, and the history at each of them; nothing where no event came before."""
    place = part.place
    same_moment = f"{place}.entity_id = {SPINE}.entity_id AND {place}.as_of_us = {SPINE}.as_of_us"
    joins = [f"LEFT JOIN {place} ON {same_moment}"]
    for window in ("", *part.windows):
        at = part.at(window)
        same_place = f"{at}.entity_id = {SPINE}.entity_id AND {at}.nth = {place}.{_before(window)}"
        joins.append(f"LEFT JOIN {part.history} AS {at} ON {same_place}")
    return joins


def _column(feature: Feature, part: _Part) -> str:
    now, then, value = part.at(), part.at(feature.window), feature.value

    def within(total: str) -> str:
        return f"(coalesce({now}.{total}, 0) - coalesce({then}.{total}, 0))"

    if feature.aggregate is Aggregate.LAST:
        return f"{now}.last_{value}"
    if feature.aggregate is Aggregate.AGE_S:
        return f"({SPINE}.as_of_us - {now}.known_us) / 1e6"
    if feature.aggregate is Aggregate.COUNT:
        return within(f"n_{value}" if value else "nth")
    n = f"nullif({within(f'n_{value}')}, 0)"
    mean = f"{within(f'sum_{value}')} / {n}"
    if feature.aggregate is Aggregate.MEAN:
        return f"{now}.pivot_{value} + {mean}"
    variance = f"({within(f'squares_{value}')} / {n} - {mean} * ({mean}))"
    return f"sqrt(CASE WHEN {variance} < 0 THEN 0 ELSE {variance} END)"  # rounding may leave less than nothing
