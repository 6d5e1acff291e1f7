"""Whether batch, stream and request agree, and DuckDB and Spark."""

from __future__ import annotations

from math import nan
from pathlib import Path

from loadtest.bench.feature_arms.lines import Worker
from loadtest.bench.feature_arms.sizes import Sizes
from loadtest.bench.report import Row, at_most, fact

_CLOSE = 1e-9
_PATHS = ("stream", "request")


def rows(flights: Worker, scratch: Path, sizes: Sizes) -> list[Row]:
    """flights: a worker of the module of that name."""
    if missing := flights.ask("without_data"):
        return [_left_out(path, "batch", missing) for path in (*_PATHS, "Spark")]
    folder = str(scratch / "flights")
    views = flights.ask("write", folder=folder)
    made = _paths(flights, folder, views, sizes)
    return made + _engines(flights, folder, str(scratch / "spark"), sizes.spark_rows)


def _paths(flights: Worker, folder: str, views: list[str], sizes: Sizes) -> list[Row]:
    found = [flights.ask("replayed", folder=folder, view=view, day=sizes.day, rows=sizes.day_rows) for view in views]
    made = []
    for path in _PATHS:
        compared, differing = (sum(one[path][at] for one in found) for at in (0, 1))
        made.append(fact(f"values compared, {path} and batch, {len(views)} views", compared, "values"))
        made.append(at_most(f"values that differ, {path}", differing, 0, "values", "batch"))
    return made


def _engines(flights: Worker, folder: str, scratch: str, moments: int) -> list[Row]:
    missing = "not with --quick" if not moments else flights.ask("without_spark")
    if missing:
        return [_left_out("Spark", "DuckDB", missing)]
    found = flights.ask("on_spark", folder=folder, scratch=scratch, rows=moments)
    return [
        fact("values compared, Spark and DuckDB", found["values"], "values"),
        at_most("counts and nulls that differ, Spark", found["counts"] + found["nulls"], 0, "values", "DuckDB"),
        _difference(found["worst"]),
    ]


def _difference(worst: float) -> Row:
    """Unrounded: it is that small."""
    return Row("largest relative difference of floats, Spark", worst, "", "DuckDB", f"<= {_CLOSE:g}", worst <= _CLOSE)


def _left_out(path: str, against: str, why: str) -> Row:
    return Row(f"values that differ, {path}", nan, "values", f"{against}, left out: {why}", "<= 0")
