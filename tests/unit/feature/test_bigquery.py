"""The script for BigQuery, as far as it can be tried without BigQuery: parsed, searched, and translated for DuckDB."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import numpy as np
import pytest
import sqlglot
from sqlglot import exp

from services.feature.define.definition import View, latest
from services.feature.define.rows import Computed
from services.feature.offline import sql
from services.feature.offline.bigquery import bigquery_sql
from services.feature.offline.sql_script import ScriptError
from tests.unit.feature import golden

TABLES = {"rides": "lake.rides", "shifts": "lake.shifts", "alarms": "some-project.lake.alarms"}

# what DuckDB understands and BigQuery does not, or takes for something else
DUCKDB_ONLY = (
    *(
        r"\b(DOUBLE|BIGINT|VARCHAR|HUGEINT|INTEGER)\b",
        r"::",
        r"%",
        r"//",
        r'"',
        r"\bVALUES\b",
        r"\bASOF\b",
        r"\bILIKE\b",
    ),
    *(r"\bread_parquet\b", r"\bf?sum\(DISTINCT", r"\bfsum\b", r"\bisnan\b", r"\bregexp_matches\b", r"\bTRY_CAST\b"),
    *(r"\bstrpos\b", r"(?<!TO_HEX\()\bMD5\(", r"\blist_", r"\bEPOCH", r"\bOR REPLACE TEMP\b"),
)
# functions that the parser does not know, and BigQuery does; in DuckDB's words, short of overflow
BIGQUERYS_OWN = {"IEEE_DIVIDE": "a / b", "SAFE_ADD": "a + b"}
# words that BigQuery keeps for itself
RESERVED = """
all and any array as asc at between by case cast collate contains create cross cube current default define
desc distinct else end enum escape except exclude exists extract false fetch following for from full group
grouping groups hash having if ignore in inner intersect interval into is join lateral left like limit lookup
merge natural new no not null nulls of on or order outer over partition preceding proto qualify range
recursive respect right rollup rows select set some struct tablesample then to treat true unbounded union
unnest using when where window with within
"""


@pytest.fixture(scope="module")
def script() -> str:
    return bigquery_sql(golden.VIEW, TABLES, "lake.labels")


@pytest.fixture(scope="module")
def parsed(script: str) -> list[exp.Expression]:
    """Statement by statement; raises where one is not BigQuery's."""
    found = sqlglot.parse(script, read="bigquery", error_level=sqlglot.ErrorLevel.RAISE)
    return [statement for statement in found if statement is not None]


def test_the_script_creates_temporary_tables_and_ends_in_a_query(parsed: list[exp.Expression]) -> None:
    *steps, query = parsed
    assert isinstance(query, exp.Select)
    assert query.named_selects == ["row_id", *golden.VIEW.columns, "known"]
    for step in steps:
        assert isinstance(step, exp.Create)
        assert step.args["kind"] == "TABLE"
        assert step.find(exp.TemporaryProperty)
        assert not step.find(exp.Command)
    called = {call.name for statement in parsed for call in statement.find_all(exp.Anonymous)}
    assert called <= set(BIGQUERYS_OWN)


def test_no_table_is_read_before_it_is_there(parsed: list[exp.Expression]) -> None:
    made: set[str] = set()
    given = {"lake.labels", "lake.rides", "lake.shifts", "some-project.lake.alarms"}
    for statement in parsed:
        read = {".".join(part.name for part in table.parts) for table in statement.find_all(exp.Table)}
        name = statement.this.name if isinstance(statement, exp.Create) else ""
        assert read - {name} <= made | given
        assert name not in made
        made.add(name)


def test_no_word_of_duckdb_alone_survives(script: str) -> None:
    for pattern in DUCKDB_ONLY:
        assert not re.search(pattern, script, re.IGNORECASE), pattern
    # and the patterns do find what they look for in the program as DuckDB has it
    plain = "\n".join(query for _, query in sql.program(golden.VIEW, lambda _: "events", sql.PORTABLE).steps)
    for pattern in (r"\bDOUBLE\b", r"\bBIGINT\b", r"\bVALUES\b", r"\bstrpos\b", r"%", r"(?<!TO_HEX\()\bMD5\("):
        assert re.search(pattern, plain, re.IGNORECASE), pattern


def test_every_name_is_quoted_or_free(parsed: list[exp.Expression]) -> None:
    names = [name for statement in parsed for name in statement.find_all(exp.Identifier)]
    assert {name.name.lower() for name in names if not name.args.get("quoted")}.isdisjoint(RESERVED.split())


def test_a_division_by_nothing_is_null_and_not_an_error(parsed: list[exp.Expression]) -> None:
    """Every divisor is a number that is not 0, wrapped in NULLIF, or stands where it was asked whether it is 0."""
    divisors = {one.expression.sql("bigquery") for step in parsed for one in step.find_all(exp.Div)}
    assert divisors
    for divisor in divisors:
        guarded = divisor.startswith(("NULLIF(", "1e6", "1.9", "(SUM(POWER(", "(4.096"))
        # of a window's parts, once neither is empty
        of_parts = re.fullmatch(r"[fh]\.n\d+(_\d+)?|\(h\.n\d+ \+ f\.n\d+_\d+\)", divisor)
        assert guarded or of_parts or float(divisor), divisor


def test_frames_look_back_a_constant_number_of_microseconds(parsed: list[exp.Expression]) -> None:
    frames = [frame for step in parsed for frame in step.find_all(exp.WindowSpec) if frame.args["kind"] == "RANGE"]
    assert {frame.args["start"].sql() for frame in frames} == {str(hours * golden.HOUR) for hours in (1, 2, 24)}
    for frame in frames:
        assert len(frame.parent.args["order"].expressions) == 1


def test_translated_for_duckdb_it_says_what_the_contract_says(script: str, tmp_path: Path) -> None:
    golden.write(tmp_path)
    with duckdb.connect() as con:
        con.execute("CREATE SCHEMA lake")
        for name, meaning in BIGQUERYS_OWN.items():
            con.execute(f"CREATE MACRO {name}(a, b) AS {meaning}")
        for source in golden.SOURCES:
            con.execute(f"CREATE VIEW lake.{source.name} AS FROM read_parquet('{tmp_path}/{source.path}')")
        con.execute("CREATE TABLE lake.labels (row_id BIGINT, entity_id VARCHAR, as_of_us BIGINT)")
        con.executemany(
            "INSERT INTO lake.labels VALUES (?, ?, ?)", [(at, *asked) for at, asked in enumerate(golden.ASKED)]
        )
        *steps, query = _translated(script)
        for step in steps:
            con.execute(step)
        table = con.sql(query).arrow().read_all().sort_by("row_id")
    columns = [table[column] for column in golden.VIEW.columns]
    rows = Computed(
        np.array([column.fill_null(0.0).to_numpy() for column in columns]).T,
        np.array([column.is_null().to_numpy() for column in columns]).T,
        np.array(table["known"].to_pylist(), dtype=np.bool_),
    )
    assert golden.differences(rows) == []


def _translated(script: str) -> list[str]:
    return sqlglot.transpile(script.replace("`some-project`.", ""), read="bigquery", write="duckdb")


def test_a_table_must_be_one(script: str) -> None:
    view = View("one", "driver", latest(golden.SHIFTS, "length"))
    assert "FROM `some-project`.`lake`.`shifts` AS s" in bigquery_sql(view, {"shifts": "some-project.lake.shifts"})
    with pytest.raises(ScriptError, match="view 'one', source 'shifts': tables must name one for it, got none"):
        bigquery_sql(view, {})
    for table in ("shifts", "lake.`shifts`", "lake.shifts; DROP TABLE x", "a.b.c.d", "lake.1"):
        with pytest.raises(ScriptError, match=r"view 'one', source 'shifts': a table must be dataset.table"):
            bigquery_sql(view, {"shifts": table})
