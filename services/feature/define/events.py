"""A micro-batch of one source's events, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from services.feature.define.clock import Clock
from services.feature.define.definition import Source
from services.feature.define.expression import Expression, Kind

if TYPE_CHECKING:
    import pyarrow as pa

Numbers = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Values (n,), anything where null, and which are null (n,)."""


@dataclass(frozen=True, slots=True)
class Events:
    """n events of one source, in any order.

    sequence, event_us, known_us: int64 (n,). entities, labels: text per column, None for null.
    values: the values that events carry and, once `prepared`, those that are made of them.
    """

    source: str
    sequence: NDArray[np.int64]
    event_us: NDArray[np.int64]
    known_us: NDArray[np.int64]
    entities: Mapping[str, Sequence[str | None]]
    values: Mapping[str, Numbers]
    labels: Mapping[str, Sequence[str | None]]

    def __len__(self) -> int:
        return len(self.sequence)

    def take(self, which: NDArray[np.integer]) -> Events:
        """Those events, in that order."""
        picked = which.tolist()
        return Events(
            self.source,
            self.sequence[which],
            self.event_us[which],
            self.known_us[which],
            {name: [column[at] for at in picked] for name, column in self.entities.items()},
            {name: (values[which], null[which]) for name, (values, null) in self.values.items()},
            {name: [column[at] for at in picked] for name, column in self.labels.items()},
        )


def prepare(source: Source, events: Events) -> Events:
    """The events that count, with the values that are made of others."""
    return prepared(source, events)[0]


def prepared(source: Source, events: Events) -> tuple[Events, NDArray[np.bool_]]:
    """Likewise, and which of the events they are, (n,)."""
    made, condition = _expressions(source)
    counts = np.ones(len(events), dtype=np.bool_)
    if not len(events) or not (made or condition):
        return events, counts
    columns = _columns(source, events)
    values = dict(events.values)
    for name, expression in made.items():
        values[name] = expression.evaluate(columns)
    if condition:
        true, null = condition.evaluate(columns)
        counts = true & ~null
    whole = Events(
        events.source, events.sequence, events.event_us, events.known_us, events.entities, values, events.labels
    )
    return (whole if counts.all() else whole.take(np.flatnonzero(counts))), counts


def from_arrow(source: Source, table: pa.Table, clock: Clock = Clock.KNOWN) -> Events:
    """Events at rest, of a table that has the source's columns; not yet prepared.

    clock: which time counts as known_us. Events without one, or without a sequence, are left out.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    known = source.known_us if clock is Clock.KNOWN else source.event_us
    there = pc.and_(pc.is_valid(table[known]), pc.is_valid(table[source.sequence]))
    if pc.sum(pc.invert(there)).as_py():
        table = table.filter(there)

    def times(name: str) -> NDArray[np.int64]:
        # no event_us does not keep an event from counting
        return np.asarray(table[name].fill_null(0).cast(pa.int64()).to_numpy())

    def numbers(name: str) -> Numbers:
        column = table[name]
        null = np.array(column.is_null().to_numpy(), dtype=np.bool_)
        return np.asarray(column.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy()), null

    def texts(name: str) -> Sequence[str | None]:
        return list(table[name].cast(pa.string()).to_pylist())

    return Events(
        source.name,
        times(source.sequence),
        times(source.event_us),
        times(known),
        {name: texts(name) for name in source.entities},
        {name: numbers(name) for name in source.plain},
        {name: texts(name) for name in source.labels},
    )


def _columns(source: Source, events: Events) -> dict[str, Any]:
    """What row expressions may speak of."""
    never = np.zeros(len(events), dtype=np.bool_)
    times = {source.event_us: events.event_us, source.known_us: events.known_us}
    columns: dict[str, Any] = {name: (us.astype(np.float64), never) for name, us in times.items()}
    return {**columns, **events.entities, **events.labels, **events.values}


def _expressions(source: Source) -> tuple[dict[str, Expression], Expression | None]:
    columns = tuple(source.columns.items())
    made = {value.name: _parsed(value.expression, columns, Kind.NUMBER) for value in source.made}
    return made, _parsed(source.where, columns, Kind.TRUTH) if source.where else None


@lru_cache(1024)
def _parsed(text: str, columns: tuple[tuple[str, Kind], ...], kind: Kind) -> Expression:
    # parsing takes longer than evaluating a micro-batch
    return Expression.parse(text, dict(columns), kind)
