"""What the compiled SQL reads: one source's events, of the entities asked for, in columns that are numbered.

Numbered, so that no name in a definition can collide with one made here. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlglot
from sqlglot import exp

from services.feature.define.clock import Clock
from services.feature.define.definition import Aggregate, Feature, Source, View

RelationOf = Callable[[Source], str]
"""What stands in FROM for a source, in the engine's own words: "read_parquet('flights/*.parquet')"."""

ENTITIES = "entities"
"""entity_id, and e: a number for it."""
MOMENTS = "moments"
"""e, t: what is asked for, once each."""

SCALARS = (Aggregate.COUNT, Aggregate.SUM, Aggregate.MEAN, Aggregate.STD, Aggregate.MIN, Aggregate.MAX)

# a value that is not finite would stay in every sum it enters
FINITE = "BETWEEN -1e300 AND 1e300"


@dataclass(frozen=True, slots=True)
class Dialect:
    """name: as sqlglot has it. total: sums float64. own_forms: DuckDB's, where they mean the same and are faster."""

    name: str
    total: str = "sum"
    own_forms: bool = False

    def write(self, query: str) -> str:
        """A query in DuckDB's words, in this engine's."""
        if self.name == "duckdb":
            return query
        silent = sqlglot.ErrorLevel.IGNORE  # of NULLS LAST, where no key is ever null
        return sqlglot.transpile(query, read="duckdb", write=self.name, unsupported_level=silent)[0]

    def quoted(self, name: str) -> str:
        return exp.to_identifier(name, quoted=True).sql(self.name)


# fsum carries what rounding loses along: the order in which threads finish does not show
DUCKDB = Dialect("duckdb", total="fsum", own_forms=True)
PORTABLE = Dialect("duckdb")
"""The portable forms, on DuckDB."""
SPARK = Dialect("spark")
BIGQUERY = Dialect("bigquery")

Step = tuple[str, str]
"""A temporary table to create: its name and its query."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some of a view's columns.

    table: has e, t and what `columns` speak of; a moment that it lacks has null there. steps: what creates it.
    columns: column of the view -> expression over `table`.
    """

    steps: Sequence[Step]
    table: str
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a view takes from one source."""

    number: int
    view: View
    source: Source
    relation: str
    dialect: Dialect
    clock: Clock

    @property
    def events(self) -> str:
        """The table with e, at_us, seq; per value f0, f1, ..., null unless finite, and v0, v1, ... as
        they are where LAST_N wants them; per label l0, l1, ...
        """
        return f"events_{self.number}"

    @property
    def places(self) -> str:
        """DuckDB's own form has this table for each moment: see sql_places.py."""
        return f"places_{self.number}"

    @property
    def windows(self) -> Sequence[tuple[int, int]]:
        """Length and step, microseconds, of all that end on a grid."""
        gridded = (f for f in self.features if f.aggregate in (*SCALARS, Aggregate.FIRST))
        return list(dict.fromkeys((f.window_us, f.step_us) for f in gridded))

    @property
    def features(self) -> Sequence[Feature]:
        return self.view.of(self.source)

    @property
    def values(self) -> Sequence[str]:
        """Those that are aggregated; LAST fetches its own."""
        return distinct(f.value for f in self.features if f.value and not (f.aggregate.of_labels or _is_picked(f)))

    @property
    def labels(self) -> Sequence[str]:
        return distinct(f.value for f in self.features if f.aggregate.of_labels)

    @property
    def clock_column(self) -> str:
        return self.source.known_us if self.clock is Clock.KNOWN else self.source.event_us

    def table(self, *parts: object) -> str:
        """The name of a table of this reading."""
        return "_".join(str(part) for part in (*parts, self.number))

    def value(self, name: str) -> str:
        """`name` as an expression over the source's own columns, in the engine's words."""
        made = next((value for value in self.source.made if value.name == name), None)
        return self.source.expression(made).sql(self._operand, self.dialect.name) if made else self._operand(name)

    def selected(self, columns: Mapping[str, str]) -> str:
        """The source's events that count, as a relation. columns: alias -> value, label or entity."""
        keys = {"entity_id": self.view.entity, "at_us": self.clock_column, "seq": self.source.sequence}
        listed = [f"{self._column(name)} AS {alias}" for alias, name in keys.items()]
        listed += [f"{self.value(name)} AS {alias}" for alias, name in columns.items()]
        if self.dialect.own_forms:
            listed.append(
                f"CAST(s.file_index AS BIGINT) * {_MOST_ROWS} + CAST(s.file_row_number AS BIGINT) AS file_row"
            )
        wanted = [f"{self._column(name)} IS NOT NULL" for name in (*keys.values(), self.source.known_us)]
        if condition := self.source.condition():
            wanted.append(f"({condition.sql(self._operand, self.dialect.name)})")
        return f"(SELECT {', '.join(listed)} FROM {self.relation} AS s WHERE {' AND '.join(distinct(wanted))})"  # noqa: S608

    def step(self, name: str, query: str, columns: Mapping[str, str] | None = None) -> Step:
        """query: in DuckDB's words; where `columns` are given, {source} stands for `selected` of them."""
        written = self.dialect.write(query.replace("{source}", _PLACE))
        return name, written.replace(_PLACE, self.selected(columns)) if columns is not None else written

    def steps(self) -> Iterable[Step]:
        """The events of the entities asked for, and their places."""
        asked = f"JOIN {ENTITIES} ON entities.entity_id = r.entity_id"
        keys = "CAST(at_us AS BIGINT) AS at_us, CAST(seq AS BIGINT) AS seq"
        if self.dialect.own_forms and all(_is_picked(f) for f in self.features):
            yield self.step(self.places, f"SELECT entities.e, {keys}, file_row FROM {{source}} AS r {asked}", {})  # noqa: S608
            return
        columns = {f"v{at}": name for at, name in enumerate(self.values)}
        raw = [f.value for f in self.features if f.aggregate is Aggregate.LAST_N]
        labels = {f"l{at}": name for at, name in enumerate(self.labels)}
        listed = ["entities.e", keys, *(["file_row"] if self.dialect.own_forms else [])]
        for at in range(len(columns)):
            number = f"CAST(v{at} AS DOUBLE)"
            if self.values[at] in raw:
                listed.append(f"{number} AS v{at}")
            listed += [f"CASE WHEN {number} {FINITE} THEN {number} END AS f{at}"]
        listed += [f"CAST({alias} AS VARCHAR) AS {alias}" for alias in labels]
        query = f"SELECT {', '.join(listed)} FROM {{source}} AS r {asked}"  # noqa: S608
        yield self.step(self.events, query, columns | labels)
        if self.dialect.own_forms:
            counted = "".join(f", CAST(f{at} IS NOT NULL AS BIGINT) AS n{at}" for at in range(len(columns)))
            yield self.places, f"SELECT e, at_us, seq, file_row{counted} FROM {self.events}"  # noqa: S608

    def moments(self) -> str:
        """A query for the moments, and where the windows of each begin: null for all time."""
        begins = [f"{tile_of('t', step)} - {window}" if window else "NULL" for window, step in self.windows]
        listed = "".join(f", CAST({begin} AS BIGINT) AS b{at}" for at, begin in enumerate(begins))
        return f"SELECT e, t{listed} FROM {MOMENTS}"  # noqa: S608

    def _operand(self, name: str) -> str:
        """A column that something is made of."""
        column = self._column(name)
        if self.dialect.name != "duckdb" or name not in self.source.plain:
            return column
        # Parquet's statistics leave NaN out, and DuckDB trusts them: "x > 9" is false of NaN where the most is 9
        number = f"CAST({column} AS DOUBLE)"
        return f"CASE WHEN isnan({number}) THEN CAST('nan' AS DOUBLE) ELSE {number} END"

    def _column(self, name: str) -> str:
        return f"s.{self.dialect.quoted(name)}"


_MOST_ROWS = 2**40  # of a file
_PLACE = "the_source_of_these_events"


def distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def tile_of(time: str, step_us: int) -> str:
    """The beginning of the step that `time` is in; rounds down also before 1970."""
    return f"({time} - (({time} % {step_us}) + {step_us}) % {step_us})"


def _is_picked(feature: Feature) -> bool:
    return feature.aggregate in (Aggregate.LAST, Aggregate.FIRST, Aggregate.AGE_S)
