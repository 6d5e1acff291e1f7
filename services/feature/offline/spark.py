"""The same features on Spark, for those who have a session.

    engine = SparkEngine(session)
    spine = labels.selectExpr("label_id AS row_id", "origin AS entity_id", "asked_us AS as_of_us")
    rows = engine.compute(ORIGIN, spine, {
        "arrivals": session.table("lake.arrivals"),
        "departures": "s3a://lake/departures/*.parquet",
    })
    rows.join(labels, rows.row_id == labels.label_id).write.parquet("s3a://lake/training/origin")

`rows` is lazy, as all of Spark is: nothing has run until it is written. What is read often, Spark reads often: persist
a DataFrame of events that was expensive to make before handing it over.

Tested with Spark 4.0. This module needs no pyspark, only the session that it is given.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from services.feature.define.definition import Source, View
from services.feature.define.expression import Kind
from services.feature.offline.sql import SPARK, SPINE, Clock, needed, program
from services.feature.offline.sql_script import answers, spine_step, statements

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    Given = DataFrame | str | PurePath
    """Events: a DataFrame, or Parquet files as a path or glob of the session's file systems."""

# a text with a collation is none of these: it would be equal to others
_INTEGERS = re.compile(r"tinyint|smallint|int|bigint")
_NUMBERS = re.compile(rf"{_INTEGERS.pattern}|float|double|decimal\(.*\)|boolean")
_TEXTS = re.compile(r"string|varchar\(\d+\)|char\(\d+\)")
_ALLOWED = {None: (_INTEGERS, "an integer"), Kind.NUMBER: (_NUMBERS, "a number"), Kind.TEXT: (_TEXTS, "text")}
_SPINE = {"row_id": None, "entity_id": Kind.TEXT, "as_of_us": None}


class SparkError(RuntimeError):
    """The events cannot be read; the message names the view, the source and the column."""


@dataclass(frozen=True, slots=True)
class SparkEngine:
    """session: stays as it is; views of the engine's own are gone again when a method returns."""

    session: SparkSession

    def compute(
        self, view: View, spine: DataFrame, events: Mapping[str, Given], clock: Clock = Clock.KNOWN
    ) -> DataFrame:
        """row_id, the view's columns as doubles, and known, as in `Computed`: one row per row of the spine, unordered.

        spine: row_id, an integer and unique; entity_id, text, null for none; as_of_us, an integer.
        events: by the name of their source.
        Raises SparkError for what can be seen before anything runs; what fails later, Spark raises itself.
        """
        frames = {source.name: self._events(view, source, events, clock) for source in view.sources}
        _check(view, SPINE, spine, _SPINE)
        with self._views({SPINE: spine} | {f"source_{name}": frame for name, frame in frames.items()}) as named:
            compiled = program(view, lambda source: named[f"source_{source.name}"], SPARK, clock)
            steps = [spine_step(named[SPINE], SPARK), *compiled.steps]
            # the names of steps are known within the statement alone, and hide those of the session's tables
            listed = ",\n".join(f"{name} AS ({query})" for name, query in steps)
            with _named(view):
                return self.session.sql(f"WITH {listed}\n{answers(view, compiled, SPARK)}")

    def statements(
        self, view: View, tables: Mapping[str, str], spine: str = "tenfold.spine", clock: Clock = Clock.KNOWN
    ) -> Sequence[str]:
        """The same as SQL, to be run one by one: temporary views, and a last query that has what `compute` returns.

        tables: by the name of their source, "database.table", or with a catalogue before it. spine: such a table too.
        Raises ScriptError.
        """
        return statements(view, tables, spine, "CREATE OR REPLACE TEMPORARY VIEW", SPARK, clock)

    def _events(self, view: View, source: Source, events: Mapping[str, Given], clock: Clock) -> DataFrame:
        """Its columns that the view reads."""
        if source.name not in events:
            raise SparkError(f"view {view.name!r}, source {source.name!r}: events must hold it, got {sorted(events)}")
        columns = needed(view, source, clock)
        with _named(view, source.name):
            frame = self._frame(events[source.name])
            _check(view, source.name, frame, columns)
            return frame.select(*(SPARK.quoted(column) for column in columns))

    def _frame(self, given: Given) -> DataFrame:
        if not isinstance(given, str | PurePath):
            return given
        path = str(given)
        reader = self.session.read.option("mergeSchema", "true")  # a column that some files lack is null there
        if found := re.search(r"[*?\[{]", path):
            # folders such as day=2013-01-01 below the glob's beginning are columns
            reader = reader.option("basePath", path[: path.rfind("/", 0, found.start()) + 1] or ".")
        return reader.parquet(path)

    @contextmanager
    def _views(self, frames: Mapping[str, DataFrame]) -> Iterator[Mapping[str, str]]:
        """Their names, in a namespace that nobody else can be using."""
        prefix = f"tenfold_{uuid.uuid4().hex}"
        names = {name: f"{prefix}_{name}" for name in frames}
        try:
            for name, frame in frames.items():
                frame.createTempView(names[name])
            yield names
        finally:
            for name in names.values():
                self.session.catalog.dropTempView(name)


def _check(view: View, source: str, frame: DataFrame, columns: Mapping[str, Kind | None]) -> None:
    """None: an integer."""
    types = dict(frame.dtypes)
    for column, kind in columns.items():
        allowed, words = _ALLOWED[kind]
        if column not in types:
            raise SparkError(
                f"view {view.name!r}, source {source!r}: there is no column {column!r}, there are: {', '.join(types)}"
            )
        if not allowed.fullmatch(types[column]):
            raise SparkError(
                f"view {view.name!r}, source {source!r}: column {column!r} must be {words}, got {types[column]}"
            )


@contextmanager
def _named(view: View, source: str = "") -> Iterator[None]:
    from pyspark.errors import PySparkException

    try:
        yield
    except PySparkException as error:
        where = f"view {view.name!r}, source {source!r}" if source else f"view {view.name!r}"
        raise SparkError(f"{where}: its events cannot be read: {error}") from error
