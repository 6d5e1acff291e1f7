"""The online store: one packed row per view and entity.

tf:<mesh>:<view>:{<entity_id>}       a row of generation 0: written one by one, never loaded as a whole
tf:<mesh>:<generation>{<entity_id>}  a row of a later generation, whose number, to base 36, is the view's alone
tf:<mesh>:views                      what can be read: see catalogue.py

The braces keep an entity's views on one node of a cluster. Keys are short because each is held in memory once per row,
in steps of 16 bytes or more: with Valkey 9, one of 21 bytes costs no more than one of 10.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.feature.define.schema import ViewSchema
from services.feature.online.catalogue import Catalogue, Pointer, Published, PublishedView
from services.feature.online.generations import Generation, over
from services.feature.online.packed import RowLayout
from services.feature.online.table import Table
from services.resilience.errors import CallError, Refused, Unavailable

log = logging.getLogger(__name__)

__all__ = ["GRACE_S", "MAX_ID_BYTES", "OnlineStore", "Published", "PublishedView", "expiries_ms"]

MAX_ID_BYTES = 256
GRACE_S = 30.0  # many times as long as readers take to learn of a new generation
_SURELY_SHORT = MAX_ID_BYTES // 4  # characters of at most 4 bytes each
_WRITE_TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 60.0
_DROP_TIMEOUT_S = 600.0  # it takes pauses
_SLACK_S = 3600.0
_ROWS_PER_LOAD = 4096
_LOADS_AT_ONCE = 2
_BELIEVED_S = 1.0  # how long a writer believes which generation is published: far less than a grace
_MOST_MOVES = 4
_ROWS_VERIFIED = 256


class OnlineStore:
    """The rows and views of one mesh in a table. Belongs to one event loop."""

    def __init__(self, table: Table, mesh: str) -> None:
        """mesh: its name in tenfold.toml; meshes share a table without seeing each other."""
        self._table = table
        self.prefix = f"tf:{mesh}:"
        """What every key begins with."""
        self._catalogue = Catalogue(table, f"tf:{mesh}:views")
        self._pointers: dict[str, tuple[float, Pointer | None]] = {}  # with when they were read

    def key_prefix(self, view: str, generation: int = 0) -> str:
        """Followed by the entity id and a closing brace, the key of a row."""
        return f"{self.prefix}{np.base_repr(generation, 36).lower()}{{" if generation else f"{self.prefix}{view}:{{"

    async def ping(self, timeout_s: float) -> None:
        await self._table.ping(timeout_s)

    def fetch(self, keys: Sequence[str], timeout_s: float) -> Coroutine[Any, Any, list[bytes | None]]:
        """The value of each key, None where there is none. Raises what `Table.fetch` raises."""
        return self._table.fetch(keys, timeout_s)

    def keys(self, timeout_s: float) -> AsyncIterator[list[str]]:
        """The keys of all rows, and of what else the mesh keeps: see `Table.keys`."""
        return self._table.keys(self.prefix, timeout_s)

    async def views(self, timeout_s: float = 1.0) -> list[PublishedView]:
        """Every published view, by name. One that cannot be read is left out and logged once."""
        return await self._catalogue.views(timeout_s)

    async def write(
        self,
        schema: ViewSchema,
        entity_ids: Sequence[str],
        event_us: int | NDArray[np.int64],
        values: NDArray[np.floating],
        null: NDArray[np.bool_] | None = None,
    ) -> int:
        """Stores a row per entity where the view is read; how many were kept: a row that has counted later events is
        never overwritten.

        event_us, values, null: see RowLayout.pack. Rows leave the store one TTL after they expired, and at least an
        hour after, so that readers can tell EXPIRED from MISSING. Rows that are that old when written belong to a
        replay of the past and stay.
        Where another generation is published meanwhile, the rows are written again, into that. What is written
        between the watermark of a generation and its publication stays behind in the one before.
        Raises ValueError before anything is written, BadInput where the published generation has another schema, or
        what the table raises; writing the same rows again is harmless.
        """
        _check_ids(entity_ids, len(values))
        now_us = time.time_ns() // 1000
        rows = RowLayout(schema).pack(event_us, values, null)
        expiries = expiries_ms(schema.ttl_s, event_us, now_us, len(rows))
        generation = await self._written_generation(schema, _BELIEVED_S)
        for _ in range(_MOST_MOVES):
            keys = self._keys(schema.name, generation, entity_ids)
            kept = await self._table.keep_newest(keys, rows, expiries, _WRITE_TIMEOUT_S)
            # after the rows: only now is it known that readers were still sent there
            now = await self._written_generation(schema)
            if now == generation:
                return kept
            generation = now
        raise Unavailable(f"view {schema.name!r} was published anew {_MOST_MOVES} times during one write")

    async def next_generation(self) -> int:
        """The number that the generation begun next will have, unless somebody else begins one first."""
        return await self._catalogue.next_number()

    async def begin(self, schema: ViewSchema) -> int:
        """The number of a new generation, to be loaded and published within a day.

        Where several of a view were begun and never published, the oldest are taken for crashed and removed.
        """
        number = await self._catalogue.begin(schema.name)
        await self._tidy([schema.name], GRACE_S)
        return number

    async def load(
        self,
        schema: ViewSchema,
        generation: int,
        entity_ids: Sequence[str],
        event_us: int | NDArray[np.int64],
        values: NDArray[np.floating],
        null: NDArray[np.bool_] | None = None,
    ) -> None:
        """Stores a row per entity in a generation that was begun and is not published.

        event_us, values, null: see RowLayout.pack. Rows do not expire one by one: a generation leaves as a whole.
        Raises ValueError for what does not fit, perhaps after the rows before it were stored, or what the table
        raises; loading the same rows again is harmless.
        """
        _check_ids(entity_ids, len(values))
        _check_begun(generation)
        layout = RowLayout(schema)
        times = np.broadcast_to(np.asarray(event_us), (len(values),))
        under_way: list[asyncio.Task[None]] = []
        try:
            for start in range(0, len(values), _ROWS_PER_LOAD):
                part = slice(start, start + _ROWS_PER_LOAD)
                rows = layout.pack(times[part], values[part], None if null is None else null[part])
                keys = self._keys(schema.name, generation, entity_ids[part])
                if len(under_way) == _LOADS_AT_ONCE:
                    await under_way.pop(0)
                under_way.append(asyncio.create_task(self._table.load(keys, rows, _LOAD_TIMEOUT_S)))
                await asyncio.sleep(0)  # the store works on these while the next are packed
            while under_way:
                await under_way.pop(0)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)  # no failure is left unheard

    async def verify(
        self,
        schema: ViewSchema,
        generation: int,
        entity_ids: Sequence[str],
        event_us: int | NDArray[np.int64],
        values: NDArray[np.floating],
        null: NDArray[np.bool_] | None = None,
    ) -> int:
        """Reads some of the rows back, evenly spread; how many. The arguments are those of `load`.

        Raises Unavailable naming the first entity whose row does not unpack to what was loaded.
        """
        _check_ids(entity_ids, len(values))
        _check_begun(generation)
        if not len(values):
            return 0
        picked = np.unique(np.linspace(0, len(values) - 1, _ROWS_VERIFIED).astype(np.int64))
        times = np.broadcast_to(np.asarray(event_us, np.int64), (len(values),))[picked]
        layout = RowLayout(schema)
        loaded = layout.pack(times, values[picked], None if null is None else null[picked])
        ids = [entity_ids[at] for at in picked]
        stored = await self._table.fetch(self._keys(schema.name, generation, ids), _WRITE_TIMEOUT_S)
        for entity_id, moment_us, *both in zip(ids, times.tolist(), loaded, stored, strict=True):
            expected, found = (layout.unpack([row], moment_us, foreign_is_missing=True) for row in both)
            if (expected.values, expected.status, expected.event_us) != (found.values, found.status, found.event_us):
                told = f"the row of {entity_id!r} in generation {generation} of view {schema.name!r}"
                raise Unavailable(f"{told} is {'missing' if both[1] is None else 'not what was loaded'}")
        return len(ids)

    async def publish(
        self,
        schemas: Sequence[ViewSchema],
        watermark_us: int,
        rows: Mapping[str, int],
        generations: Mapping[str, int] | None = None,
        *,
        kind: str = "row",
        even_if_older: bool = False,
        grace_s: float = GRACE_S,
    ) -> Published:
        """Makes views readable, or replaces how they are read, all in one step; other views stay as they are.

        Publish after the rows are written: readers interpret rows by what is published.
        rows: view name -> rows written; every view must be there.
        generations: view name -> the generation to read from now on; a view without one is read where it was.
        kind: see PublishedView.
        Where a later watermark is published already (of equal ones: a generation begun later), that stays and ours is
        removed, unless even_if_older. So are generations that were replaced longer than grace_s ago, or whose loading
        crashed. Whatever goes wrong with removing is left to the next publication.
        Raises NotFound where a generation is not there, BadInput where a view without one changes its schema while it
        has one, or what the table raises; then nothing is published. Publishing the same again is harmless.
        """
        if missing := [schema.name for schema in schemas if schema.name not in rows]:
            raise ValueError(f"rows must count every published view, got none for {', '.join(missing)}")
        if not schemas:
            return Published({}, {})
        numbers = generations or {}
        for number in numbers.values():
            _check_begun(number)
        views = [
            PublishedView(
                name=schema.name,
                entity=schema.entity,
                columns=list(schema.columns),
                ttl_s=schema.ttl_s,
                schema_hash=f"{schema.schema_hash:016x}",
                watermark_us=watermark_us,
                rows=rows[schema.name],
                generation=numbers.get(schema.name, 0),
                kind=kind,
                defaults=tuple(schema.defaults),
                definition=schema.meaning,
            )
            for schema in schemas
        ]
        done = await self._catalogue.publish(views, numbers.keys(), even_if_older)
        self._pointers.clear()
        await self._tidy(numbers, grace_s)
        return done

    async def retire(self, view: str, generation: int, grace_s: float = GRACE_S) -> int:
        """Removes a generation that was replaced, after grace_s from now; how many rows it had.

        grace_s: longer than readers take to learn what is published.
        Raises ValueError where the generation is published, or what the table raises: then the next publication
        removes it.
        """
        await asyncio.sleep(grace_s)
        return await self._remove(view, generation)

    async def generations(self, view: str) -> Sequence[Generation]:
        """Those that have rows in the store, or may have."""
        listed, _ = await self._catalogue.listed(view)
        return listed

    async def _remove(self, view: str, generation: int) -> int:
        try:
            await self._catalogue.give_up(view, generation)
        except Refused:
            # a full store takes no note, but the rows are what fills it: without them there is room again
            _, published = await self._catalogue.listed(view)
            if generation == published:
                raise
        count = await self._table.drop(self.key_prefix(view, generation), _DROP_TIMEOUT_S)
        await self._catalogue.forget(view, generation)
        log.info("generation removed", extra={"view": view, "generation": generation, "rows": count})
        return count

    async def _tidy(self, views: Iterable[str], grace_s: float) -> None:
        """Removes what nobody reads any more."""
        now_us = time.time_ns() // 1000
        for view in views:
            try:
                listed, published = await self._catalogue.listed(view)
                for number in over(listed, published, now_us, round(grace_s * 1e6)):
                    await self._remove(view, number)
            except CallError as error:
                log.warning("old generations not removed", extra={"view": view, "reason": str(error)})

    async def _written_generation(self, schema: ViewSchema, at_most_s: float = 0.0) -> int:
        """Where the view is read, as of at most so long ago; 0 where it is not published."""
        read_at, pointer = self._pointers.get(schema.name, (-float("inf"), None))
        now = time.monotonic()
        if now - read_at >= at_most_s:
            pointer = await self._catalogue.pointer(schema.name)
            self._pointers[schema.name] = (now, pointer)
        if pointer is None:
            return 0
        pointer.check(schema)
        return pointer.generation

    def _keys(self, view: str, generation: int, entity_ids: Sequence[str]) -> list[str]:
        prefix = self.key_prefix(view, generation)
        return [f"{prefix}{entity_id}}}" for entity_id in entity_ids]


def is_id(text: str) -> bool:
    """Whether an entity may be named so."""
    return 0 < len(text) <= _SURELY_SHORT or 0 < len(text.encode()) <= MAX_ID_BYTES


def _check_ids(entity_ids: Sequence[str], n: int) -> None:
    if len(entity_ids) != n:
        raise ValueError(f"there must be one entity id per row, got {len(entity_ids)} ids and {n} rows")
    lengths = list(map(len, entity_ids))
    if min(lengths, default=1) > 0 and max(lengths, default=1) <= _SURELY_SHORT:
        return
    for entity_id in entity_ids:
        if not is_id(entity_id):
            raise ValueError(f"an entity id must have 1 to {MAX_ID_BYTES} bytes, got {entity_id[:64]!r}")


def _check_begun(generation: int) -> None:
    if generation < 1:
        raise ValueError(f"generation must be one that was begun, at least 1, got {generation}")


def expiries_ms(ttl_s: float, event_us: int | NDArray[np.int64], now_us: int, n: int) -> list[int]:
    """When each row leaves the store, milliseconds since 1970; 0 for never."""
    if ttl_s <= 0:
        return [0] * n
    events = np.broadcast_to(np.asarray(event_us, np.int64), (n,))
    leaves_us = events + round((ttl_s + max(ttl_s, _SLACK_S)) * 1e6)
    replayed = events + round(ttl_s * 1e6) <= now_us
    expiries: list[int] = np.where(replayed, 0, leaves_us // 1000).tolist()
    return expiries
