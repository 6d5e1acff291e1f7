"""Features of every entity at the end of every day, written as Parquet: history for a new feature, or for analysis.

    <out>/day=2013-01-01/bucket=03.parquet     entity_id, as_of_us, one float32 column per feature

The work is cut by entity hash and by runs of days; what is whole is never done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zlib import crc32

import numpy as np
import pyarrow as pa

from services.feature.define.definition import View
from services.feature.offline.parts import Parts
from services.feature.offline.store import OfflineStore, Spine

_DAYS_AT_ONCE = 31  # the events before them are read once for all
_ROWS_AT_ONCE = 500_000

Progress = Callable[[int, int], None]
"""Told the parts that are done, and all of them."""


@dataclass(frozen=True, slots=True)
class Days:
    """first to last, both included; a day ends at midnight UTC."""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"the last day must not be before the first, {self.first}, got {self.last}")

    @classmethod
    def parse(cls, first: str, last: str) -> Days:
        """From "2013-01-31". Raises ValueError."""
        return cls(date.fromisoformat(first), date.fromisoformat(last))

    def __iter__(self) -> Iterator[date]:
        return (self.first + timedelta(days=n) for n in range((self.last - self.first).days + 1))


def end_us(day: date) -> int:
    """Midnight after it, microseconds since 1970 UTC."""
    after = day + timedelta(days=1)
    return int(datetime(after.year, after.month, after.day, tzinfo=UTC).timestamp()) * 1_000_000


def bucket_of(entity_id: str, buckets: int) -> int:
    """The same in every process and on every machine."""
    return crc32(entity_id.encode()) % buckets


def backfill(
    offline: OfflineStore,
    view: View,
    days: Days,
    out: str,
    *,
    buckets: int = 16,
    restart: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> Parts:
    """Writes the view's rows for every day into the folder `out`; one that was cut off goes on where it stopped.

    Raises OfflineError or PartsError; parts that are whole stay.
    """
    if not 1 <= buckets <= 4096:
        raise ValueError(f"buckets must be 1 to 4096, got {buckets}")
    facts = {
        "view": view.name,
        "definition": view.fingerprint(),
        "events": offline.facts(view.sources),
        "days": [days.first.isoformat(), days.last.isoformat()],
        "buckets": buckets,
    }
    parts = Parts.open(out, facts, restart=restart)
    total, names = 0, {}
    for day in days:
        for bucket in range(buckets):
            names[day, bucket] = f"day={day.isoformat()}/bucket={bucket:02d}"
            total += 1
    if not parts.missing(names.values()):
        progress(total, total)
        return parts
    known = offline.first_known(view, end_us(days.last))
    for bucket in range(buckets):
        members = {entity_id: us for entity_id, us in known.items() if bucket_of(entity_id, buckets) == bucket}
        wanted = [day for day in days if parts.missing([names[day, bucket]])]
        for some in _runs(wanted, max(1, len(members))):
            for day, table in _rows(offline, view, members, some):
                parts.write(names[day, bucket], table)
                progress(len(parts.rows), total)
    return parts


def _runs(days: list[date], entities: int) -> Iterator[list[date]]:
    """Days that are computed together."""
    at_once = max(1, min(_DAYS_AT_ONCE, _ROWS_AT_ONCE // entities))
    for start in range(0, len(days), at_once):
        yield days[start : start + at_once]


def _rows(
    offline: OfflineStore, view: View, first_known: dict[str, int], days: list[date]
) -> Iterator[tuple[date, pa.Table]]:
    """Each day with the rows of the entities that something was known of by its end."""
    ids: list[list[str]] = [sorted(member for member, us in first_known.items() if us < end_us(day)) for day in days]
    moments = np.repeat(np.array([end_us(day) for day in days], dtype=np.int64), [len(some) for some in ids])
    computed = offline.compute(view, Spine([member for some in ids for member in some], moments))
    with np.errstate(over="ignore"):
        values = computed.values.astype(np.float32)
    start = 0
    for day, some in zip(days, ids, strict=True):
        at = slice(start, start := start + len(some))
        columns = {"entity_id": pa.array(some, pa.string()), "as_of_us": pa.array(moments[at])}
        for number, name in enumerate(view.columns):
            columns[name] = pa.array(values[at, number], mask=computed.null[at, number])
        yield day, pa.table(columns)
