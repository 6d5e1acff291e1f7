"""Where moments and the beginnings of windows stand among a source's events: DuckDB's own form of that question.

Events of all entities in one line, ordered by (entity, time, sequence), have places 0, 1, ... . What was known of an
entity before a moment, or in a window, is a run of places, and its two ends are found by binary search over one array
of int64. DuckDB would need a sort of all columns per window, or an as-of join.
"""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_MOST = 2**62  # of entity and time as one number


def find(con: duckdb.DuckDBPyConnection, table: str, events: str, moments: str) -> None:
    """Registers `table` and `placed_<table>`.

    events: a query for e, at_us, seq, file_row, and n0, n1, ... BIGINT: 1 where the event's value takes part, else 0.
    moments: a query for e, t, and b0, b1, ... BIGINT: where windows begin, null for all time.

    table: per moment e, t; pos, its number after the last place; at_us, seq, file_row: of the last event known before
    t; past: the place after that event; and per window w: low_w, the window's first place, which is `past` where it is
    empty; row_w, of the event there; n0_w, n1_w, ...: how many values of its events take part.
    placed_<table>: place, file_row.
    """
    known, asked = _columns(con, events), _columns(con, moments)
    windows = [asked[name] for name in asked if name.startswith("b")]
    line = _Line(known, asked["e"], [asked["t"], *(begin for begin in windows if begin is not None)])
    order = np.argsort(line.keys(asked["e"], asked["t"]))
    e, t = asked["e"][order], asked["t"][order]
    first, past = line.places(e), line.places(e, t)
    columns = {
        "e": pa.array(e),
        "t": pa.array(t),
        "pos": pa.array(len(line) + np.arange(len(e))),
        "past": pa.array(past),
    }
    for name in ("at_us", "seq", "file_row"):
        columns[name] = line.taken(name, past - 1, past > first)
    for w, begin in enumerate(windows):
        low = first if begin is None else np.minimum(line.places(e, begin[order]), past)
        columns |= {f"low_{w}": pa.array(low), f"row_{w}": line.taken("file_row", low, low < past)}
        for name, so_far in line.so_far.items():
            columns[f"{name}_{w}"] = pa.array(so_far[past] - so_far[low])
    con.register(table, pa.table(columns))
    con.register(
        f"placed_{table}",
        pa.table({"place": pa.array(np.arange(len(line))), "file_row": pa.array(line.columns["file_row"])}),
    )


def forget(con: duckdb.DuckDBPyConnection, table: str) -> None:
    """Undoes `find`."""
    con.unregister(table)
    con.unregister(f"placed_{table}")


class _Line:
    """Events in their order. e, times: all that will be asked for."""

    def __init__(self, events: dict[str, Any], e: Ints, times: list[Ints]) -> None:
        entities = 1 + max(int(some.max(initial=0)) for some in (events["e"], e))
        every = [events["at_us"], *times]
        self._begin = min((int(some.min()) for some in every if len(some)), default=0)
        self._span = max((int(some.max()) for some in every if len(some)), default=0) - self._begin + 1
        self._distinct: Ints | None = None
        if entities * self._span >= _MOST:
            # as one number they would be too large: ranks stand for the times
            self._distinct = np.unique(np.concatenate(every))
            self._span = len(self._distinct) + 1
        keys = self.keys(events["e"], events["at_us"])
        order = np.argsort(keys)
        self._keys = keys[order]
        if (self._keys[1:] == self._keys[:-1]).any():
            order = np.lexsort((events["file_row"], events["seq"], keys))
        self.columns = {name: events[name][order] for name in ("at_us", "seq", "file_row")}
        self.so_far = {
            name: np.concatenate([[0], np.cumsum(events[name][order])]) for name in events if name.startswith("n")
        }
        """Of a value: how many of the events before a place have it."""

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self, e: Ints, us: Ints) -> Ints:
        ranks = us - self._begin if self._distinct is None else np.searchsorted(self._distinct, us)
        return np.asarray(e * self._span + ranks, dtype=np.int64)

    def places(self, e: Ints, us: Ints | None = None) -> Ints:
        """The first place of an event of `e` at `us` or later, or of any of its events."""
        wanted = e * self._span if us is None else self.keys(e, us)
        return np.searchsorted(self._keys, wanted).astype(np.int64)

    def taken(self, name: str, places: Ints, there: NDArray[np.bool_]) -> pa.Array:
        """What events at some places have; null where there is none."""
        column = self.columns[name]
        if not len(column):
            return pa.nulls(len(places), pa.int64())
        return pa.array(column[np.where(there, places, 0)], mask=~there)


def _columns(con: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    """None for a column of nulls; there are no others with nulls."""
    found = con.sql(query).to_arrow_table()
    return {
        name: None if len(found) and column.null_count == len(found) else column.to_numpy()
        for name, column in zip(found.column_names, found.columns, strict=True)
    }
