"""Row expressions and the rows that they are tried on: every engine must say of them what numpy says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.feature.define.expression import Kind

NAN, INF = math.nan, math.inf

# by name: number columns hold float or None, text columns str or None
Rows = Mapping[str, Sequence[Any]]

COLUMNS = {
    "a": Kind.NUMBER,
    "b": Kind.NUMBER,
    "input.turnaround_min": Kind.NUMBER,
    "known_us": Kind.NUMBER,
    "flag": Kind.NUMBER,
    "t": Kind.TEXT,
    "u": Kind.TEXT,
}

_A = [None, NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, -0.5, 1.5, 1e308, -1e308, 5e-324, 9007199254740993.0]
_B = [0.0, 1.0, None, NAN, -3.0, 0.1, INF, 2.0, -0.0, -0.5, 4503599627370495.5, 0.49999999999999994, -1e-300]
_TIMES = [0.0, -1.0, 1.0, 1356998400000000.0, 1357041599999999.0, -86400000000.0, -3600000001.0, 9007199254740991.0]
_TEXTS = ["JFK", "jfk", "", "é€😀b", "it's", "a\\b", "Straße", " 12 ", "-1.5e3", ".5", "5.", "1e", "12\n", "1_0", "NaN"]
_TEXTS += ["1e400", "-1e400", "\u00a012", "inf", "${x}", "+7", "1d", "0x1F", "٣", "abcdefgh", "1e-400", "LGA"]

ROW_COUNT = len(_A) * len(_B)
ROWS: Rows = {
    "a": [a for a in _A for _ in _B],
    "b": [b for _ in _A for b in _B],
    "input.turnaround_min": [[30.0, None, 45.5, -10.0][at % 4] for at in range(ROW_COUNT)],
    "known_us": [[*_TIMES, None][at % 9] for at in range(ROW_COUNT)],
    "flag": [[1.0, 0.0, None][at % 3] for at in range(ROW_COUNT)],
    "t": [[*_TEXTS, None][at % 28] for at in range(ROW_COUNT)],
    "u": [["JFK", "LGA", None, "b", ""][at % 5] for at in range(ROW_COUNT)],
}

NUMBERS = (
    *("a + b", "a - b", "a * b", "a / b", "a % b", "-a", "-(-a)", "a - -1", "a * 1e308 * 10", "b % -0.3", "a % 2"),
    *("ABS(a)", "SQRT(a)", "LN(a)", "EXP(a)", "FLOOR(a)", "CEIL(a)", "ROUND(a)", "SIGN(a)", "FLOOR(b)", "ROUND(b)"),
    *("POWER(a, b)", "POWER(a, 2)", "POWER(1, b)", "POWER(-1, a)", "POWER(a, -1)", "POWER(ROUND(b), -1)"),
    *("LEAST(a, b)", "GREATEST(a, b)", "LEAST(a, b, flag)", "GREATEST(a, b, 0)", "NULLIF(a, b)", "NULLIF(a, 0)"),
    *("COALESCE(a, b)", "COALESCE(a, b, 0)", "COALESCE(NULL, a)", "CASE WHEN a > b THEN a ELSE b END"),
    *("CASE WHEN a > 1 THEN 1 WHEN a IS NULL THEN NULL WHEN flag = 1 THEN b END", "CASE WHEN NULL THEN 1 END"),
    *(
        "a > b",
        "a = b",
        "a <> 0 AND b > 1",
        "a > 1 OR flag = 1",
        "a IN (1, -1, 2.5)",
        "a BETWEEN -1 AND b",
        "u = 'JFK'",
    ),
    *("LENGTH(t)", "CAST(t AS DOUBLE)", "CAST(SUBSTR(t, 2, 3) AS DOUBLE)", "hour_of_day(known_us)"),
    *("day_of_week(known_us)", "hour_of_day(known_us + 5 * 3.6e9)", "hour_of_day(a)", "day_of_week(b * 1e15)"),
    *("input.turnaround_min - COALESCE(a, 0)", '"input.turnaround_min" / 60', "3", "NULL", "2 > 1", "flag + 1"),
)
TRUTHS = (
    *("a = b", "a <> b", "a < b", "a <= b", "a > b", "a >= b", "a = 1", "a <> 1", "a < 1", "a <= 1", "a > 1", "a >= 1"),
    *("1 > a", "1 <= a", "NOT a > b", "a > 0 AND b > 0", "a > 0 OR b > 0", "NOT (a > 0 AND NOT b > 0)", "a IS NULL"),
    *("a IS NOT NULL", "a + b IS NULL", "(a > b) IS NULL", "a IN (0)", "a NOT IN (0, 1)", "a NOT BETWEEN 0 AND 1"),
    *("t = 'JFK'", "t <> u", "t < u", "t <= 'a'", "t > 'Z'", "t >= u", "t IN ('JFK', '${x}', 'it''s', 'a\\b')"),
    *("t IS NULL", "t BETWEEN 'A' AND 'Z'", "a IN (1, 2, 3, 4, 5, 6, 7, 8, 9, 0, -1, 2.5)", "TRUE", "NULL", "a > NULL"),
    *("COALESCE(a > b, FALSE)", "CASE WHEN a > b THEN u = 'b' ELSE b > 0 END", "SQRT(a) >= 0", "TRUE OR a > b"),
)
TEXTS = (
    *("t", "LOWER(t)", "UPPER(t)", "SUBSTR(t, 1, 2)", "SUBSTR(t, 3, 0)", "SUBSTR(t, 4, 100)", "COALESCE(t, u, 'none')"),
    *("NULLIF(t, u)", "CASE WHEN a > b THEN t WHEN flag = 1 THEN UPPER(u) ELSE '\"$' END", "NULL", "'it''s \\ $'"),
    *("LOWER(COALESCE(NULLIF(u, ''), SUBSTR(t, 1, 1)))", "CASE WHEN TRUE THEN t END"),
)
EXAMPLES: tuple[tuple[str, Kind], ...] = (
    *((text, Kind.NUMBER) for text in NUMBERS),
    *((text, Kind.TRUTH) for text in TRUTHS),
    *((text, Kind.TEXT) for text in TEXTS),
)


def columns_of(rows: Rows) -> dict[str, Any]:
    """As `Expression.evaluate` takes them."""
    return {
        name: (
            list(values)
            if COLUMNS[name] is Kind.TEXT
            else (np.array(values, np.float64), np.array([value is None for value in values], np.bool_))
        )
        for name, values in rows.items()
    }


def listed(found: Any, kind: Kind) -> list[Any]:
    """What `Expression.evaluate` returned as one list, None for null."""
    if kind is Kind.TEXT:
        return list(found)
    values, null = found
    return [None if missing else value for value, missing in zip(values.tolist(), null.tolist(), strict=True)]


def same(left: Any, right: Any) -> bool:
    """Nulls, texts and truths exactly, numbers within 1e-12 of their size."""
    if left is None or right is None or isinstance(left, str | bool):
        return left is right or left == right
    return (math.isnan(left) and math.isnan(right)) or math.isclose(left, right, rel_tol=1e-12)
