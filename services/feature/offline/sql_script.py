"""A compiled program as text: statements over tables that exist already, for an engine that somebody else runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.feature.define.definition import View
from services.feature.offline.sql import SPINE, Clock, Dialect, Program, program
from services.feature.offline.sql_events import Step

_TABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*([.][A-Za-z_][A-Za-z0-9_-]*){1,2}")


class ScriptError(ValueError):
    """A table that cannot be named in a script; the message names the view, the source and the table."""


def statements(
    view: View, tables: Mapping[str, str], spine: str, create: str, dialect: Dialect, clock: Clock
) -> list[str]:
    """What creates the temporary tables, in this order, and the query for a row per row of the spine.

    tables: by source, "dataset.table" or with a catalogue or project before it; temporary tables have no such prefix,
    so nothing collides. create: "CREATE TEMP TABLE", or what the engine has in its place. Raises ScriptError.
    """
    named = {source.name: _quoted(view, source.name, tables.get(source.name), dialect) for source in view.sources}
    given = spine_step(_quoted(view, SPINE, spine, dialect), dialect)
    compiled = program(view, lambda source: named[source.name], dialect, clock)
    steps = [given, *compiled.steps]
    return [*(f"{create} {name} AS\n{query.strip()}" for name, query in steps), answers(view, compiled, dialect)]


def spine_step(relation: str, dialect: Dialect) -> Step:
    """relation: has row_id, entity_id and as_of_us."""
    columns = "CAST(row_id AS BIGINT) AS row_id, CAST(entity_id AS VARCHAR) AS entity_id"
    query = dialect.write(f"SELECT {columns}, CAST(as_of_us AS BIGINT) AS as_of_us FROM given")  # noqa: S608
    return SPINE, query.replace("FROM given", f"FROM {relation}")


def answers(view: View, compiled: Program, dialect: Dialect) -> str:
    """The last query: row_id, the view's columns under their names, and known. Every row of the spine is there."""
    columns = "".join(f", r.c{at} AS {dialect.quoted(column)}" for at, column in enumerate(view.columns))
    return f"""SELECT s.row_id{columns}, r.row_id IS NOT NULL AS known
FROM {SPINE} AS s LEFT JOIN (
{compiled.rows.strip()}
) AS r ON r.row_id = s.row_id"""  # noqa: S608


def _quoted(view: View, source: str, table: str | None, dialect: Dialect) -> str:
    if table is None:
        raise ScriptError(f"view {view.name!r}, source {source!r}: tables must name one for it, got none")
    if not _TABLE.fullmatch(table):
        raise ScriptError(
            f"view {view.name!r}, source {source!r}: a table must be dataset.table, or with a catalogue or project"
            f" before it, in letters, digits, _ and -, got {table!r}"
        )
    return ".".join(dialect.quoted(part) for part in table.split("."))
