"""Moves features from the offline to the online store: every entity's row as of one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import View
from services.feature.define.schema import ViewSchema
from services.feature.offline.store import OfflineStore, Spine

CHUNK_ROWS = 1024


class OnlineWriter(Protocol):
    """What takes the rows; `services.feature.online.store.OnlineStore` is one."""

    async def write(
        self, schema: ViewSchema, entity_ids: Sequence[str], event_us: int, values: NDArray[np.float32]
    ) -> int:
        """How many rows were kept: one that has counted later events is not overwritten."""
        ...

    async def publish(self, schemas: Sequence[ViewSchema], watermark_us: int, rows: Mapping[str, int]) -> object:
        """Makes the views readable. rows: view name -> rows written."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of a view's rows.

    event_us: the watermark: every event known before it was counted, and none later.
    values: float32 (n, columns), NaN for null.
    """

    schema: ViewSchema
    entity_ids: Sequence[str]
    event_us: int
    values: NDArray[np.float32]


def rows_at(offline: OfflineStore, view: View, moment_us: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[Rows]:
    """The row of every entity that something was known of before the moment, ordered by id."""
    ids = offline.entity_ids(view, moment_us)
    values = offline.compute(view, Spine(ids, np.full(len(ids), moment_us, dtype=np.int64))).float32()
    return in_chunks(Rows(view.schema(), ids, moment_us, values), chunk_rows)


def in_chunks(rows: Rows, chunk_rows: int = CHUNK_ROWS) -> Iterator[Rows]:
    """The same rows, at most `chunk_rows` at a time."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    for start in range(0, len(rows.entity_ids), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        yield Rows(rows.schema, rows.entity_ids[chunk], rows.event_us, rows.values[chunk])


async def materialize(
    offline: OfflineStore,
    views: Sequence[View],
    moment_us: int,
    online: OnlineWriter,
    progress: Callable[[str, float], None] = lambda _view, _share: None,
) -> dict[str, int]:
    """Writes every view as of the moment, then publishes all; rows per view.

    progress: told the view in hand and the share of views that are done. Running it again is harmless.
    """
    written = {}
    for done, view in enumerate(views):
        progress(view.name, done / len(views))
        # the queries block, and the online store's connection must not wait for them
        chunks = await asyncio.to_thread(lambda view: list(rows_at(offline, view, moment_us)), view)
        written[view.name] = await write(online, chunks)
    await online.publish([view.schema() for view in views], moment_us, written)
    progress("published", 1.0)
    return written


async def write(online: OnlineWriter, chunks: Iterable[Rows]) -> int:
    """Writes one chunk after the other; how many rows there were."""
    count = 0
    for rows in chunks:
        await online.write(rows.schema, rows.entity_ids, rows.event_us, rows.values)
        count += len(rows.entity_ids)
    return count
