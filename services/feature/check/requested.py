"""Features on request, by two engines: row by row as a server works them out, and in SQL over all rows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.feature.define.definition import INPUT, RequestView, View
from services.feature.define.events import Numbers
from services.feature.define.rows import Computed
from services.feature.offline.training import served_numbers
from services.feature.online.packed import NULL, OK, Rows

# what requests carry is for whoever sends them to say: signs, halves, both ends of float64, and none
_INPUTS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.5, 7.0, 60.0, 1e-9, 1e6, -1e300, 1e300, float("nan"), float("inf"), None)
_ANY_INPUT = 0.5  # share of inputs that are drawn at random instead


def in_sql(view: RequestView, views: Sequence[View], columns: Mapping[str, Numbers]) -> Computed:
    """As SQL has it. columns: "input.<name>" and "<view>.<column>", n numbers each."""
    arrays = {name: pa.array(values, mask=null) for name, (values, null) in columns.items()}
    expressions = [expression.sql(_quoted) for expression in view.expressions(views)]
    selected = ", ".join(f"CAST({text} AS DOUBLE)" for text in expressions)
    with duckdb.connect(config={"threads": 1}) as con:
        con.register("given", pa.table(arrays))
        found = con.sql(f"SELECT {selected} FROM given").to_arrow_table()  # noqa: S608
    null = np.stack([np.asarray(column.is_null().to_numpy(), bool) for column in found.columns], axis=1)
    values = np.stack([np.asarray(column.fill_null(0.0).to_numpy()) for column in found.columns], axis=1)
    return Computed(values, null, np.ones(len(values), bool))


def row_by_row(
    view: RequestView, views: Sequence[View], columns: Mapping[str, Numbers], n: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """As the feature service answers n requests of one row each: values, and which are null, (n, columns)."""
    from services.feature.onrequest import RequestLayout, Stored  # knows protobuf, which nothing else here needs

    stored = {one.name: one.columns for one in views}
    layout = RequestLayout.parse([one.expression for one in view.features], view.inputs, stored)
    read = [one for one in views if one.name in layout.reads]
    values, status = [], []
    for at in range(n):
        inputs = {
            name: [float(numbers[at])]
            for name in view.inputs
            for numbers, null in [columns[f"{INPUT}.{name}"]]
            if not null[at]
        }
        rows = layout.rows(inputs, {one.name: Stored(one.columns, _row(one, columns, at)) for one in read}, 1)
        values.append(np.frombuffer(rows.values, "<f4"))
        status.append(np.frombuffer(rows.status, np.uint8))
    return np.stack(values), np.stack(status) != OK


def _row(view: View, columns: Mapping[str, Numbers], at: int) -> Rows:
    """As the store answers it."""
    numbers = [columns[f"{view.name}.{column}"] for column in view.columns]
    null = np.array([null[at] for _, null in numbers])
    values = np.where(null, np.nan, np.array([values[at] for values, _ in numbers])).astype("<f4")
    status = np.where(null, NULL, OK).astype(np.uint8)
    return Rows(values.tobytes(), status.tobytes(), bytes(8), np.zeros(1, "<f4").tobytes())


def made_up(
    view: RequestView,
    views: Sequence[View],
    known: Mapping[str, Computed],
    n: int,
    random: np.random.Generator,
) -> dict[str, Numbers]:
    """Some requests: stored rows that there were, in any combination, and inputs of every kind.

    known: view -> its rows; of every view that is read, at least one. n: how many requests.
    """
    columns: dict[str, Numbers] = {}
    for one in views:
        if one.name in known:
            rows = known[one.name]
            at = random.integers(0, len(rows.known), n)
            columns |= served_numbers(one, Computed(rows.values[at], rows.null[at], rows.known[at]))
    for name in view.inputs:
        values = np.where(random.random(n) < 0.5, random.normal(0, 100, n), np.round(random.normal(0, 10, n)))
        null = np.zeros(n, bool)
        for number in np.flatnonzero(random.random(n) >= _ANY_INPUT).tolist():
            chosen = _INPUTS[int(random.integers(len(_INPUTS)))]
            values[number], null[number] = (0.0, True) if chosen is None else (chosen, False)
        columns[f"{INPUT}.{name}"] = values, null
    return columns


def reads(view: RequestView, views: Sequence[View]) -> set[str]:
    """The stored views whose columns its expressions speak of."""
    names = {name for expression in view.expressions(views) for name in expression.columns}
    return {name.partition(".")[0] for name in names} - {INPUT}


def _quoted(name: str) -> str:
    return f'"{name}"'
