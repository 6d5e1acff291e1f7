"""What every benchmark prints: a table for people, and as its last line one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a benchmark.

    against: what the value is compared with, empty for an absolute limit. goal: as in "<= 1.2". holds: None where
    the row states a fact and has no goal.
    """

    measure: str
    value: float
    unit: str
    against: str = ""
    goal: str = ""
    holds: bool | None = None


def at_most(measure: str, value: float, limit: float, unit: str, against: str = "") -> Row:
    """A row that holds where `value` is no more than `limit`."""
    return Row(measure, round(value, 4), unit, against, f"<= {limit:g}", value <= limit)


def at_least(measure: str, value: float, limit: float, unit: str, against: str = "") -> Row:
    """A row that holds where `value` is no less than `limit`."""
    return Row(measure, round(value, 4), unit, against, f">= {limit:g}", value >= limit)


def fact(measure: str, value: float, unit: str, against: str = "") -> Row:
    """A row without a goal."""
    return Row(measure, round(value, 4), unit, against)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [("measure", "value", "unit", "against", "goal", "holds")]
    verdict = {True: "yes", False: "NO", None: ""}
    for row in rows:
        value = "n/a" if math.isnan(row.value) else f"{row.value:,.4g}"
        cells.append((row.measure, value, row.unit, row.against, row.goal, verdict[row.holds]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def emit(bench: str, rows: Sequence[Row]) -> None:
    """Prints the table, then the JSON object, where a value that could not be measured is null."""
    print(table(rows))
    said = [{**asdict(row), "value": None if math.isnan(row.value) else row.value} for row in rows]
    print(json.dumps({"bench": bench, "rows": said}))
