"""A row expression means the same in numpy and in DuckDB, and what cannot mean anything is refused with its reason."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import sqlglot
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.feature.define.expression import Expression, ExpressionError, Kind
from tests.unit.feature.expression_examples import COLUMNS, EXAMPLES, INF, NAN, ROWS, Rows, columns_of, listed, same


def parsed(text: str, kind: Kind = Kind.NUMBER) -> Expression:
    return Expression.parse(text, COLUMNS, kind)


def value(text: str, kind: Kind = Kind.NUMBER, **columns: Any) -> Any:
    """Of one row, whose columns not given are null."""
    rows = {name: [columns.get(name)] for name in COLUMNS}
    return listed(parsed(text, kind).evaluate(columns_of(rows)), kind)[0]


def in_duckdb(connection: duckdb.DuckDBPyConnection, expression: Expression, rows: Rows) -> list[Any]:
    kinds = {Kind.NUMBER: pa.float64(), Kind.TEXT: pa.string()}
    table = pa.table({name: pa.array(list(values), kinds[COLUMNS[name]]) for name, values in rows.items()})
    table = table.append_column("row", pa.array(range(len(table))))
    connection.register("rows", table)
    sql = expression.sql(lambda name: f'"{name}"')
    return [found for (found,) in connection.execute(f"SELECT {sql} FROM rows ORDER BY row").fetchall()]


@pytest.fixture(scope="module")
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as connection:
        yield connection


def assert_equal(found: list[Any], wanted: list[Any], rows: Rows) -> None:
    assert len(found) == len(wanted)
    for at, pair in enumerate(zip(found, wanted, strict=True)):
        assert same(*pair), ({name: values[at] for name, values in rows.items()}, pair)


@pytest.mark.parametrize(("text", "kind"), EXAMPLES, ids=[f"{kind.value}: {text}" for text, kind in EXAMPLES])
def test_every_example_is_the_same_in_duckdb_and_numpy(
    engine: duckdb.DuckDBPyConnection, text: str, kind: Kind
) -> None:
    expression = parsed(text, kind)
    found = listed(expression.evaluate(columns_of(ROWS)), kind)
    assert_equal(found, in_duckdb(engine, expression, ROWS), ROWS)


@pytest.mark.parametrize("dialect", ["spark", "bigquery"])
def test_every_example_parses_in_the_other_dialects(dialect: str) -> None:
    for text, kind in EXAMPLES:
        sql = parsed(text, kind).sql(lambda name: f"`{name}`", dialect)
        assert sqlglot.parse_one(f"SELECT {sql} AS x FROM rows", read=dialect).find(sqlglot.exp.Command) is None


def test_one_row_is_worth_what_it_is_among_others() -> None:
    rows = random.Random(7).sample(range(len(ROWS["a"])), 12)
    for text, kind in EXAMPLES:
        expression = parsed(text, kind)
        among = listed(expression.evaluate(columns_of(ROWS)), kind)
        for row in rows:
            alone = {name: [values[row]] for name, values in ROWS.items()}
            assert same(listed(expression.evaluate(columns_of(alone)), kind)[0], among[row]), (text, alone)


def _joined(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map("".join)


def _expressions() -> tuple[st.SearchStrategy[str], st.SearchStrategy[str], st.SearchStrategy[str]]:
    """Numbers, truths and texts. Numbers are made of what every engine rounds alike, so that comparisons are exact."""
    literals = st.sampled_from(["0", "1", "-1", "2.5", "1e308", "-0.5", "5e-324", "NULL", "7"])
    numbers = st.sampled_from(["a", "b", "input.turnaround_min", '"input.turnaround_min"']) | literals
    texts = st.sampled_from(["t", "u", "'JFK'", "'it''s'", "'\\'", "''", "NULL"])
    truths = st.sampled_from(["TRUE", "FALSE"])
    for _ in range(3):
        n, t, c = numbers, texts, truths
        numbers |= (
            _joined("(", n, st.sampled_from([" + ", " - ", " * ", " / ", " % "]), n, ")")
            | _joined(st.sampled_from(["ABS", "SQRT", "FLOOR", "CEIL", "ROUND", "SIGN", "-"]), "(", n, ")")
            | _joined(st.sampled_from(["hour_of_day", "day_of_week"]), "(", n, ")")
            | _joined(st.sampled_from(["LEAST", "GREATEST", "COALESCE"]), "(", n, ", ", n, ", ", n, ")")
            | _joined("NULLIF(", n, ", ", n, ")")
            | _joined(st.sampled_from(["LENGTH(", "CAST("]), t).map(lambda text: text + _closing(text))
            | _case(c, n)
        )
        operator = st.sampled_from([" = ", " <> ", " < ", " <= ", " > ", " >= "])
        truths |= (
            _joined("(", n, operator, n, ")")
            | _joined("(", t, operator, t, ")")
            | _joined("(", c, st.sampled_from([" AND ", " OR "]), c, ")")
            | _joined("(NOT ", c, ")")
            | _joined("((", n | t | c, ") IS ", st.sampled_from(["", "NOT "]), "NULL)")
            | _joined("(", n, " BETWEEN ", n, " AND ", n, ")")
            | _joined("(", n, " IN (1, 0, -1, 2.5))")
            | _joined("(", t, " NOT IN ('JFK', ''))")
        )
        texts |= (
            _joined(st.sampled_from(["LOWER(", "UPPER("]), t, ")")
            | _joined("SUBSTR(", t, ", 2, 2)")
            | _joined(st.sampled_from(["COALESCE(", "NULLIF("]), t, ", ", t, ")")
            | _case(c, t)
        )
    return numbers, truths, texts


def _case(condition: st.SearchStrategy[str], result: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    turn = _joined(" WHEN ", condition, " THEN ", result)
    return _joined("CASE", turn, turn, " ELSE ", result, " END")


def _closing(text: str) -> str:
    return ")" if text.startswith("LENGTH") else " AS DOUBLE)"


EXACT, TRUTHS, TEXTS = _expressions()
# a last digit of these may differ between engines, so nothing is compared with them
INEXACT = _joined(st.sampled_from(["EXP(", "LN("]), EXACT, ")") | _joined("POWER(", EXACT, ", ", EXACT, ")")
SCALED = _joined("COALESCE(-", INEXACT, " / ", EXACT, ", ", EXACT, ")")
WITH_KINDS = (
    st.tuples(EXACT | INEXACT | SCALED, st.just(Kind.NUMBER))
    | st.tuples(TRUTHS, st.sampled_from([Kind.NUMBER, Kind.TRUTH]))
    | st.tuples(TEXTS, st.just(Kind.TEXT))
)
FLOATS = st.none() | st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5, 1e308]) | st.floats(-1e16, 1e16)
STRINGS = st.none() | st.sampled_from(["JFK", "12.5", " -1e3 "]) | st.text("aZé€😀'\\ 1.-", max_size=5)
SOME_ROWS = st.integers(1, 12).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            name: st.lists(STRINGS if kind is Kind.TEXT else FLOATS, min_size=n, max_size=n)
            for name, kind in COLUMNS.items()
        }
    )
)


def refusal(text: str, kind: Kind) -> str | None:
    try:
        parsed(text, kind)
    except ExpressionError as error:
        return str(error)
    return None


@settings(max_examples=150, deadline=None)
@given(WITH_KINDS, SOME_ROWS)
def test_any_expression_over_any_rows_is_the_same_in_duckdb_and_numpy(
    engine: duckdb.DuckDBPyConnection, example: tuple[str, Kind], rows: Rows
) -> None:
    text, kind = example
    reason = refusal(text, kind)
    assert reason is None or "must be at most" in reason or "must have at most" in reason or " is a " in reason
    assume(reason is None)
    expression = parsed(text, kind)
    assert_equal(listed(expression.evaluate(columns_of(rows)), kind), in_duckdb(engine, expression, rows), rows)
    for dialect in ("spark", "bigquery"):
        sqlglot.parse_one(f"SELECT {expression.sql(lambda name: f'`{name}`', dialect)}", read=dialect)


PIECES = ["a", "t", "(", ")", ",", "+", "-", "*", "1", "'x'", "AND", "IN", "CASE", "ABS(", "1e", "[", ".", ";"]


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    reason = refusal(text, Kind.TRUTH)
    assert reason is None or len(reason) < 500


def test_nan_is_equal_to_itself_and_above_every_number() -> None:
    assert value("a = b", Kind.TRUTH, a=NAN, b=NAN) is True
    assert value("a > b", Kind.TRUTH, a=NAN, b=INF) is True
    assert value("a <= 5", Kind.TRUTH, a=NAN) is False
    assert value("LEAST(a, b)", a=NAN, b=3.0) == 3.0
    assert math.isnan(value("GREATEST(a, b)", a=NAN, b=3.0))


def test_null_is_neither_true_nor_false() -> None:
    assert value("a > 1", Kind.TRUTH) is None
    assert value("a > 1 OR b = 1", Kind.TRUTH, b=1.0) is True
    assert value("a > 1 AND b = 1", Kind.TRUTH, b=2.0) is False
    assert value("NOT a > 1", Kind.TRUTH) is None
    assert value("CASE WHEN a > 1 THEN 1 ELSE 2 END") == 2.0


@pytest.mark.parametrize(
    "text",
    [
        "a / 0",
        "a % 0",
        "SQRT(0 - a)",
        "LN(0)",
        "LN(-a)",
        "POWER(-a, 0.5)",
        "POWER(0, -a)",
        "LEAST(a, b)",
        "GREATEST(b, a)",
    ],
)
def test_what_has_no_value_is_null(text: str) -> None:
    assert value(text, a=4.0) is None


def test_overflow_is_infinite() -> None:
    assert value("a * 10", a=1e308) == INF
    assert value("EXP(a)", a=1000.0) == INF
    assert value("POWER(-10, 309)") == -INF


def test_numbers_round_half_away_from_zero_and_remainders_have_the_sign_of_the_dividend() -> None:
    assert [value("ROUND(a)", a=a) for a in (2.5, -2.5, 0.49999999999999994, -0.5)] == [3.0, -3.0, 0.0, -1.0]
    assert [value("a % 3", a=a) for a in (5.0, -5.0, INF)][:2] == [2.0, -2.0]


def test_a_comparison_is_a_number_where_a_number_is_wanted() -> None:
    assert [value("a >= 15", a=a) for a in (15.0, 14.0, None)] == [1.0, 0.0, None]


def test_hours_and_days_are_of_utc_also_before_1970() -> None:
    assert [value("hour_of_day(known_us)", known_us=us) for us in (0.0, 3_599_999_999.0, 3.6e9, -1.0)] == [0, 0, 1, 23]
    assert [value("day_of_week(known_us)", known_us=us) for us in (0.0, -1.0, 4 * 86.4e9)] == [3, 2, 0]
    # 1 January 2013 was a Tuesday
    assert value("day_of_week(known_us)", known_us=1357041599999999.0) == 1
    assert value("hour_of_day(known_us)", known_us=1357041599999999.0) == 11


def test_a_text_that_is_no_decimal_is_a_null_number() -> None:
    texts = ["-1.5e3", " 12 ", ".5", "nan", "inf", "1_0", "12\n", "", "1d", None]
    assert [value("CAST(t AS DOUBLE)", t=t) for t in texts] == [-1500.0, 12.0, 0.5, *([None] * 7)]


def test_whole_numbers_and_truths_of_a_source_are_numbers_in_sql(engine: duckdb.DuckDBPyConnection) -> None:
    expression = parsed("a / 2 + flag")
    rows = "(SELECT 3 AS a, TRUE AS flag)"
    assert engine.execute(f"SELECT {expression.sql(str)} FROM {rows}").fetchall() == [(2.5,)]


def test_a_constant_has_as_many_rows_as_the_columns() -> None:
    assert listed(parsed("1 + 1").evaluate({"t": ["x", "y", "z"]}), Kind.NUMBER) == [2.0] * 3
    assert listed(parsed("1 + 1").evaluate({"a": (np.zeros(4), np.zeros(4, bool))}), Kind.NUMBER) == [2.0] * 4
    assert listed(parsed("'x'", Kind.TEXT).evaluate({}), Kind.TEXT) == ["x"]


def test_no_rows_have_no_values() -> None:
    nothing = columns_of({name: [] for name in COLUMNS})
    for text, kind in EXAMPLES:
        assert listed(parsed(text, kind).evaluate(nothing), kind) == []


def test_evaluating_changes_no_column() -> None:
    for text, kind in EXAMPLES:
        columns = columns_of(ROWS)
        parsed(text, kind).evaluate(columns)
        for name, given_again in columns_of(ROWS).items():
            np.testing.assert_equal(columns[name], given_again, text)


def test_an_expression_names_the_columns_it_reads() -> None:
    assert parsed("input.turnaround_min - COALESCE(a, b) + a").columns == ("input.turnaround_min", "a", "b")


def test_expressions_are_equal_by_text_and_travel_between_processes() -> None:
    one = parsed("a / b")
    assert one == parsed("a / b")
    assert one != parsed("b / a")
    assert len({one, parsed("a / b")}) == 1
    for twin in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert twin == one
        assert twin.sql(str) == one.sql(str)
        assert (
            listed(twin.evaluate(columns_of(ROWS)), Kind.NUMBER)[1]
            == listed(one.evaluate(columns_of(ROWS)), Kind.NUMBER)[1]
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("delay + 1", "no column 'delay', allowed: a, b"),
        ("input.turnaround_mn", "did you mean 'input.turnaround_min'"),
        ("SQTR(a)", "no function 'SQTR' (did you mean 'SQRT'?), allowed: ABS"),
        ("SUM(a)", "no function 'SUM'"),
        ("SUM(a) OVER ()", "no function 'SUM'"),
        ("ABS(a) OVER ()", "no function 'OVER'"),
        ("a || 'x'", "not part of a row expression, allowed: literals, columns"),
        ("IFNULL(a, 1)", "no function 'IFNULL' (did you mean 'NULLIF'?)"),
        ("a.*", "no column 'a.*'"),
        ("*", "not part of a row expression"),
        ("(SELECT 1)", "not part of a row expression"),
        ("a IN (SELECT 1)", "not part of a row expression"),
        ("EXISTS(SELECT 1)", "no function 'EXISTS'"),
        ("a; b", "must be one expression, got 2"),
        ("", "must be one expression, got 0"),
        ("-- a", "must be one expression, got 0"),
        ("a b", "'a b' is not a row expression"),
        ("(a", "is not a row expression"),
        ("a, b", "is not a row expression"),
        ("SELECT a", "is not a row expression"),
        ("t + 1", "t + 1: t is a text, wanted: a number"),
        ("a = 'x'", "a = 'x': 'x' is a text, wanted: a number"),
        ("(a > 1) + 1", "is a truth, wanted: a number"),
        ("(a > 1) = (b > 1)", "is a truth, wanted: a number or a text"),
        ("NOT a", "NOT a: a is a number, wanted: a truth"),
        ("COALESCE(a, t)", "t is a text, wanted: a number"),
        ("CASE WHEN a THEN 1 END", "a is a number, wanted: a truth"),
        ("CASE a WHEN 1 THEN 2 END", "not part of a row expression"),
        ("t", "t is a text, wanted: a number"),
        ("ABS()", "lacks a part"),
        ("ABS(a, b)", "is greater than the maximum"),
        ("ROUND(a, 1)", "has more parts than allowed"),
        ("LEAST(a)", "needs at least 2 parts, got 1"),
        ("NULLIF(a)", "a function lacks a part"),
        ("hour_of_day(a, b)", "not part of a row expression"),
        ("CAST(t AS INT)", "allowed: CAST(text AS DOUBLE)"),
        ("CAST(a AS DOUBLE)", "a is a number, wanted: a text"),
        ("LENGTH(SUBSTR(t, 0, 1))", "start must be a whole literal from 1 to 65536, got 0"),
        ("LENGTH(SUBSTR(t, 1, a))", "length must be a whole literal from 0 to 65536, got a"),
        ("LENGTH(SUBSTR(t, 1))", "got none"),
        ("a IN (b)", "IN takes literals other than NULL"),
        ("a IN (1, NULL)", "IN takes literals other than NULL"),
        ("a IS TRUE", "not part of a row expression"),
        ("t LIKE 'x'", "not part of a row expression"),
        ("1e999", "a number must be a decimal within"),
        ("1e", "a number must be a decimal within"),
        ("a" + " + a" * 70, "must be at most 64 levels deep"),
        ("(" * 900 + "a" + ")" * 900, "must be at most 64 levels deep"),
        ("a + " * 1024 + "a", "must have at most 4096 characters, got 4097"),
        ("POWER(" * 12 + "a" + ", 2)" * 12, "once written as SQL"),
        ("LENGTH('\x00')", "must have no control characters"),
        ("LENGTH('\ud800')", "must have no control characters"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError) as error:
        parsed(text)
    assert reason in str(error.value)
    assert len(str(error.value)) < 500


def test_a_truth_is_not_any_number() -> None:
    with pytest.raises(ExpressionError, match="a is a number, wanted: a truth"):
        parsed("a", Kind.TRUTH)


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(ExpressionError, match="no dialect 'mysql', allowed: duckdb, spark, bigquery"):
        parsed("a").sql(str, "mysql")
