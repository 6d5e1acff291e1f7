"""A row expression as SQL, with what each engine needs so that it means the same in all.

DuckDB 2.0 and Spark 4.0 are run in tests; the text for BigQuery is only parsed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlglot import exp

from services.feature.define.expression_tree import Apply, Column, ExpressionError, Kind, Literal, Node

DIALECTS = ("duckdb", "spark", "bigquery")
MOST_SQL = 250_000  # characters; guards name their parts more than once, so a nest of them grows fast

_TYPES = {
    "duckdb": {Kind.NUMBER: "DOUBLE", Kind.TEXT: "VARCHAR", Kind.TRUTH: "BOOLEAN"},
    "spark": {Kind.NUMBER: "DOUBLE", Kind.TEXT: "STRING", Kind.TRUTH: "BOOLEAN"},
    "bigquery": {Kind.NUMBER: "FLOAT64", Kind.TEXT: "STRING", Kind.TRUTH: "BOOL"},
}
_CAPITALS, _SMALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_DECIMAL = r"^ *[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)? *\z"

# {0}, {1}: the parts. {decimal}: what a text matches that is a number
_COMMON = {
    "NEGATE": "(-{0})",
    "+": "({0} + {1})",
    "-": "({0} - {1})",
    "*": "({0} * {1})",
    "/": "({0} / NULLIF({1}, 0e0))",
    "%": "({0} % NULLIF({1}, 0e0))",
    "AND": "({0} AND {1})",
    "OR": "({0} OR {1})",
    "NOT": "(NOT {0})",
    "IS NULL": "({0} IS NULL)",
    "=": "({0} = {1})",
    "<>": "({0} <> {1})",
    "<": "({0} < {1})",
    "<=": "({0} <= {1})",
    ">": "({0} > {1})",
    ">=": "({0} >= {1})",
    "NULLIF": "NULLIF({0}, {1})",
    "NUMBER": "CAST({0} AS DOUBLE)",
    "ABS": "ABS({0})",
    "SQRT": "(CASE WHEN {0} >= 0e0 THEN SQRT({0}) END)",
    "LN": "(CASE WHEN {0} > 0e0 THEN LN({0}) END)",
    "EXP": "EXP({0})",
    "FLOOR": "FLOOR({0})",
    "CEIL": "CEIL({0})",
    "ROUND": "ROUND({0})",
    # 1 to any power is 1 to C and not a number to Java, hence the finite exponent
    "POWER": "(CASE WHEN {0} IS NOT NULL AND {1} IS NOT NULL AND NOT isnan({0}) AND NOT isnan({1})"
    " AND NOT ({0} = 0e0 AND {1} < 0e0)"
    " THEN NULLIF(POWER({0}, LEAST(GREATEST({1}, -1e300), 1e300)), CAST('NaN' AS DOUBLE)) END)",
    "SIGN": "(CASE WHEN isnan({0}) THEN {0} ELSE CAST(SIGN({0}) AS DOUBLE) END)",
    # the engines differ in the case of letters other than these
    "LOWER": f"TRANSLATE({{0}}, '{_CAPITALS}', '{_SMALL}')",
    "UPPER": f"TRANSLATE({{0}}, '{_SMALL}', '{_CAPITALS}')",
    "LENGTH": "CAST(LENGTH({0}) AS DOUBLE)",
    "CAST": "(CASE WHEN regexp_matches({0}, {decimal}) THEN TRY_CAST(TRIM({0}) AS DOUBLE) END)",
}
_SPARK = {
    # to Spark these are BIGINT, so numbers that have no fraction must not pass through them
    "FLOOR": "(CASE WHEN ABS({0}) < 4503599627370496e0 THEN CAST(FLOOR({0}) AS DOUBLE) ELSE {0} END)",
    "CEIL": "(CASE WHEN ABS({0}) < 4503599627370496e0 THEN CAST(CEIL({0}) AS DOUBLE) ELSE {0} END)",
    "CAST": "(CASE WHEN {0} RLIKE {decimal} THEN TRY_CAST(TRIM({0}) AS DOUBLE) END)",
}
# Of p and q, the parts: to BigQuery overflow is an error, and NaN neither equal to itself nor above any number.
_BIGQUERY = {
    "+": "COALESCE(SAFE_ADD(p, q), IEEE_DIVIDE(SIGN(p), IF(q IS NULL, NULL, 0)))",
    "-": "COALESCE(SAFE_SUBTRACT(p, q), IEEE_DIVIDE(SIGN(p), IF(q IS NULL, NULL, 0)))",
    "*": "COALESCE(SAFE_MULTIPLY(p, q), IEEE_DIVIDE(SIGN(p) * SIGN(q), 0))",
    "/": "IEEE_DIVIDE(p, NULLIF(q, 0))",
    # MOD knows no FLOAT64; within 1e38
    "%": "CASE WHEN q = 0 THEN NULL WHEN IS_NAN(p) OR IS_INF(p) OR IS_NAN(q) THEN CAST('NaN' AS FLOAT64)"
    " WHEN ABS(q) > ABS(p) THEN p ELSE CAST(MOD(CAST(p AS BIGNUMERIC), CAST(q AS BIGNUMERIC)) AS FLOAT64) END",
    "=": "(p = q OR (IS_NAN(p) AND IS_NAN(q)))",
    "<>": "NOT (p = q OR (IS_NAN(p) AND IS_NAN(q)))",
    "<": "(p < q OR (NOT IS_NAN(p) AND IS_NAN(q)))",
    "<=": "NOT (q < p OR (NOT IS_NAN(q) AND IS_NAN(p)))",
    ">": "(q < p OR (NOT IS_NAN(q) AND IS_NAN(p)))",
    ">=": "NOT (p < q OR (NOT IS_NAN(p) AND IS_NAN(q)))",
    "NULLIF": "IF(p = q OR (IS_NAN(p) AND IS_NAN(q)), NULL, p)",
    "NUMBER": "CAST(CAST(p AS INT64) AS FLOAT64)",
    "SQRT": "IF(p >= 0 OR IS_NAN(p), SQRT(p), NULL)",
    "LN": "IF(p > 0 OR IS_NAN(p), LN(p), NULL)",
    "EXP": "IF(p > 709.782712893384, CAST('inf' AS FLOAT64), EXP(p))",
    "POWER": "CASE WHEN p IS NULL OR q IS NULL OR IS_NAN(p) OR IS_NAN(q) OR (p = 0 AND q < 0) THEN NULL"
    " WHEN p < 0 AND NOT IS_INF(p) AND NOT IS_INF(q) AND q <> TRUNC(q) THEN NULL"
    " ELSE COALESCE(SAFE.POW(p, q), IF(p < 0 AND q - 2 * TRUNC(q / 2) <> 0, CAST('-inf' AS FLOAT64),"
    " CAST('inf' AS FLOAT64))) END",
    "SIGN": "SIGN(p)",
    "LENGTH": "CAST(LENGTH(p) AS FLOAT64)",
    "CAST": "IF(REGEXP_CONTAINS(p, {decimal}), SAFE_CAST(TRIM(p, ' ') AS FLOAT64), NULL)",
}
_OF_BOTH = {"=", "<>", "<", "<=", ">", ">=", "NULLIF"}  # of texts they mean the same in BigQuery


def render(node: Node, column: Callable[[str], str], dialect: str) -> str:
    """column: how a column is written there. Raises ExpressionError for an unknown dialect, or SQL that is too long."""
    if dialect not in DIALECTS:
        raise ExpressionError(f"no dialect {dialect!r}, allowed: {', '.join(DIALECTS)}")
    text = _rendered(node, column, dialect)
    if len(text) > MOST_SQL:
        raise ExpressionError(f"must have at most {MOST_SQL} characters once written as SQL: nest fewer functions")
    return text


def _rendered(node: Node, column: Callable[[str], str], dialect: str) -> str:
    if isinstance(node, Column):
        return f"CAST({column(node.name)} AS {_TYPES[dialect][node.kind]})"
    if isinstance(node, Literal):
        return _literal(node, dialect)
    parts = [render(part, column, dialect) for part in node.parts]
    match node.what:
        case "CASE":
            turns = zip(parts[:-1:2], parts[1::2], strict=True)
            return f"(CASE {' '.join(f'WHEN {when} THEN {then}' for when, then in turns)} ELSE {parts[-1]} END)"
        case "IN":
            return f"({parts[0]} IN ({', '.join(parts[1:])}))"
        case "COALESCE":
            return f"COALESCE({', '.join(parts)})"
        case "SUBSTR":
            start, length = (int(part.value or 0) for part in node.parts[1:] if isinstance(part, Literal))
            return f"SUBSTR({parts[0]}, {start}, {length})"
        case "LEAST" | "GREATEST":
            return _extreme(node.what, parts, dialect)
    return _applied(node, parts, dialect)


def _applied(node: Apply, parts: Sequence[str], dialect: str) -> str:
    what, decimal = node.what, _text(_DECIMAL, dialect)
    if dialect == "bigquery" and what in _BIGQUERY and not (what in _OF_BOTH and node.parts[0].kind is Kind.TEXT):
        # p and q, so that no part is written twice
        named = ", ".join(f"{part} AS {name}" for part, name in zip(parts, "pq", strict=False))
        return f"(SELECT {_BIGQUERY[what].format(decimal=decimal)} FROM UNNEST([STRUCT({named})]))"  # noqa: S608
    last = node.parts[-1]
    if what in ("/", "%") and isinstance(last, Literal) and last.value:
        return f"({parts[0]} {what} {parts[1]})"  # plain to read, and nothing to guard
    template = _SPARK.get(what, _COMMON[what]) if dialect == "spark" else _COMMON[what]
    return template.format(*parts, decimal=decimal)


def _extreme(what: str, parts: Sequence[str], dialect: str) -> str:
    """Left to themselves, two of the engines skip nulls, and to BigQuery NaN is least as well as greatest."""
    nulls = " OR ".join(f"{part} IS NULL" for part in parts)
    found = f"{what}({', '.join(parts)})"
    if dialect == "bigquery" and what == "LEAST":
        all_nan = " AND ".join(f"IS_NAN({part})" for part in parts)
        numbers = ", ".join(f"IF(IS_NAN({part}), CAST('inf' AS FLOAT64), {part})" for part in parts)
        found = f"IF({all_nan}, CAST('NaN' AS FLOAT64), LEAST({numbers}))"
    return f"(CASE WHEN {nulls} THEN NULL ELSE {found} END)"


def _literal(node: Literal, dialect: str) -> str:
    match node.value:
        case None:
            return f"CAST(NULL AS {_TYPES[dialect][node.kind]})"
        case bool():
            return str(node.value).upper()
        case str():
            return _text(node.value, dialect)
    digits = repr(node.value)
    # without an exponent engines take it for a decimal, of few digits
    digits = digits if "e" in digits else f"{digits}e0"
    return f"({digits})" if digits.startswith("-") else digits


def _text(value: str, dialect: str) -> str:
    text = exp.Literal.string(value).sql(dialect=dialect)
    return text.replace("$", r"\u0024") if dialect == "spark" else text  # there "${name}" stands for a setting
