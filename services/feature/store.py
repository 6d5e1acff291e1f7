"""The online store: one packed row per view and entity, and one registry of the views that can be read.

tf:<mesh>:<view>:{<entity_id>}   a packed row; the braces keep an entity's views on one shard of a cluster
tf:<mesh>:views                  hash: view name -> JSON of PublishedView
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.feature.packed import EVENT_AT, RowLayout
from services.feature.schema import ViewSchema
from services.feature.valkey import CommandError, Commands, Word

log = logging.getLogger(__name__)

MAX_ID_BYTES = 256
# one script call or MGET holds the store's only thread; longer ones let nobody else in
_ROWS_PER_WRITE = 128
_KEYS_PER_READ = 4096
_WRITES_AT_ONCE = 4
_WRITE_TIMEOUT_S = 10.0
_SLACK_S = 3600.0

# A row is replaced unless it has the same schema and has counted later events. A row of another schema can no longer
# be read, so it never stands in the way. ARGV: the rows, then one expiry in milliseconds since 1970 per row, 0 for
# none. Answers how many rows were kept.
_KEEP_NEWEST = f"""
local n, kept = #KEYS, 0
for i = 1, n do
  local row, old = ARGV[i], redis.call('GETRANGE', KEYS[i], 0, {EVENT_AT + 7})
  if #old < {EVENT_AT + 8} or string.sub(old, 1, {EVENT_AT}) ~= string.sub(row, 1, {EVENT_AT})
     or struct.unpack('<i8', old, {EVENT_AT + 1}) <= struct.unpack('<i8', row, {EVENT_AT + 1}) then
    if ARGV[n + i] == '0' then
      redis.call('SET', KEYS[i], row)
    else
      redis.call('SET', KEYS[i], row, 'PXAT', ARGV[n + i])
    end
    kept = kept + 1
  end
end
return kept
"""
_KEEP_NEWEST_SHA = hashlib.sha1(_KEEP_NEWEST.encode(), usedforsecurity=False).hexdigest()


class PublishedView(msgspec.Struct, frozen=True):
    """One view as the registry holds it.

    schema_hash: 16 hexadecimal digits, as JSON readers elsewhere round large numbers.
    watermark_us: microseconds since 1970 UTC up to which the newest materialisation counted events.
    rows: how many it wrote.
    """

    name: str
    entity: str
    columns: list[str]
    ttl_s: float
    schema_hash: str
    watermark_us: int
    rows: int

    def schema(self) -> ViewSchema:
        """Raises ValueError where the recorded hash is not that of the recorded columns."""
        schema = ViewSchema(self.name, self.entity, tuple(self.columns), self.ttl_s)
        if f"{schema.schema_hash:016x}" != self.schema_hash:
            raise ValueError(f"schema_hash must be {schema.schema_hash:016x}, got {self.schema_hash}")
        return schema


class OnlineStore:
    """The rows and views of one mesh in Valkey."""

    def __init__(self, valkey: Commands, mesh: str) -> None:
        """mesh: its name in tenfold.toml; meshes share a store without seeing each other."""
        self._valkey = valkey
        self._prefix = f"tf:{mesh}:"
        self._registry = f"tf:{mesh}:views"
        self._unreadable_views: set[bytes] = set()

    def key_prefix(self, view: str) -> str:
        """Followed by the entity id and a closing brace, the key of a row."""
        return f"{self._prefix}{view}:{{"

    async def ping(self, timeout_s: float) -> None:
        await self._valkey.call("PING", timeout_s=timeout_s)

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """The value of each key, None where there is none: one MGET, or several where keys are very many.

        Raises Unavailable, DeadlineExceeded or Refused as `Valkey.call` does.
        """
        if len(keys) <= _KEYS_PER_READ:
            return cast("list[bytes | None]", await self._valkey.call("MGET", *keys, timeout_s=timeout_s))
        parts = [keys[start : start + _KEYS_PER_READ] for start in range(0, len(keys), _KEYS_PER_READ)]
        replies = [self._valkey.call("MGET", *part, timeout_s=timeout_s) for part in parts]
        return list(itertools.chain.from_iterable(await asyncio.gather(*replies)))

    async def write(
        self,
        schema: ViewSchema,
        entity_ids: Sequence[str],
        event_us: int | NDArray[np.int64],
        values: NDArray[np.floating],
        null: NDArray[np.bool_] | None = None,
    ) -> int:
        """Stores a row per entity; how many were kept: a row that has counted later events is never overwritten.

        event_us, values, null: see RowLayout.pack. Rows leave the store one TTL after they expired, and at least an
        hour after, so that readers can tell EXPIRED from MISSING. Rows that are that old when written belong to a
        replay of the past and stay.
        Raises ValueError before anything is written, or what `fetch` raises; writing the same rows again is harmless.
        """
        if len(entity_ids) != len(values):
            raise ValueError(f"there must be one entity id per row, got {len(entity_ids)} ids and {len(values)} rows")
        for entity_id in entity_ids:
            if not 0 < len(entity_id.encode()) <= MAX_ID_BYTES:
                raise ValueError(f"an entity id must have 1 to {MAX_ID_BYTES} bytes, got {entity_id[:64]!r}")
        now_us = time.time_ns() // 1000
        rows = RowLayout(schema).pack(event_us, values, now_us, null)
        prefix = self.key_prefix(schema.name)
        keys = [f"{prefix}{entity_id}}}" for entity_id in entity_ids]
        expiries = expiries_ms(schema.ttl_s, event_us, now_us, len(rows))
        starts = range(0, len(rows), _ROWS_PER_WRITE)
        chunks = (slice(start, start + _ROWS_PER_WRITE) for start in starts)
        kept = 0
        while group := list(itertools.islice(chunks, _WRITES_AT_ONCE)):
            counts = await asyncio.gather(*(self._keep_newest(keys[c], rows[c], expiries[c]) for c in group))
            kept += sum(counts)
        return kept

    async def publish(self, schemas: Sequence[ViewSchema], watermark_us: int, rows: Mapping[str, int]) -> None:
        """Makes views readable, or replaces how they are read; other views stay as they are.

        Publish after the rows are written: readers interpret rows by what is published.
        rows: view name -> rows written; every view must be there.
        """
        if missing := [schema.name for schema in schemas if schema.name not in rows]:
            raise ValueError(f"rows must count every published view, got none for {', '.join(missing)}")
        fields: list[Word] = []
        for schema in schemas:
            view = PublishedView(
                name=schema.name,
                entity=schema.entity,
                columns=list(schema.columns),
                ttl_s=schema.ttl_s,
                schema_hash=f"{schema.schema_hash:016x}",
                watermark_us=watermark_us,
                rows=rows[schema.name],
            )
            fields += [schema.name, msgspec.json.encode(view)]
        if fields:
            await self._valkey.call("HSET", self._registry, *fields, timeout_s=_WRITE_TIMEOUT_S)

    async def views(self, timeout_s: float = 1.0) -> list[PublishedView]:
        """Every published view, by name. One that cannot be read is left out and logged once."""
        reply = await self._valkey.call("HGETALL", self._registry, timeout_s=timeout_s)
        found: list[PublishedView] = []
        for name, text in zip(reply[::2], reply[1::2], strict=True):
            try:
                view = msgspec.json.decode(text, type=PublishedView)
                view.schema()
            except (ValueError, msgspec.DecodeError) as error:
                if text not in self._unreadable_views:
                    self._unreadable_views.add(text)
                    extra = {"view": name.decode(errors="replace"), "reason": str(error)}
                    log.warning("published view unreadable", extra=extra)
                continue
            found.append(view)
        return sorted(found, key=lambda view: view.name)

    async def _keep_newest(self, keys: Sequence[str], rows: Sequence[bytes], expiries_ms: Sequence[int]) -> int:
        words: tuple[Word, ...] = (len(keys), *keys, *rows, *expiries_ms)
        try:
            kept = await self._valkey.call("EVALSHA", _KEEP_NEWEST_SHA, *words, timeout_s=_WRITE_TIMEOUT_S)
        except CommandError as error:
            if error.code != "NOSCRIPT":
                raise
            kept = await self._valkey.call("EVAL", _KEEP_NEWEST, *words, timeout_s=_WRITE_TIMEOUT_S)
        return int(kept)


def expiries_ms(ttl_s: float, event_us: int | NDArray[np.int64], now_us: int, n: int) -> list[int]:
    """When each row leaves the store, milliseconds since 1970; 0 for never."""
    if ttl_s <= 0:
        return [0] * n
    events = np.broadcast_to(np.asarray(event_us, np.int64), (n,))
    leaves_us = events + round((ttl_s + max(ttl_s, _SLACK_S)) * 1e6)
    replayed = events + round(ttl_s * 1e6) <= now_us
    expiries: list[int] = np.where(replayed, 0, leaves_us // 1000).tolist()
    return expiries
