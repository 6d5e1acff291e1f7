"""Rows of entities that are asked for often, kept in memory in front of the store.

Right as long as the store tells of every change (`services.feature.online.tracking` listens) and no longer:

- A change is told on one connection and rows are read on another, so either may overtake the other. Therefore a row
  is kept only if no change of its key was told between sending its read and having its answer. A row that was read
  before a change carries the old value, and that read was sent before the change was told: if the answer came first,
  being told drops the row; if it came last, the row is not kept.
- A change that was not told yet is bounded by the lease: rows are served only until `renew`'s moment, and whoever
  renews knows that everything that happened up to `lease` before it has been told.
- Whatever else may go wrong (a store moved behind its address, SWAPDB, which Valkey does not tell), no row outlives
  max_age_s from the moment its read was sent.

So an answer is what the store held at some moment not more than one lease before it was asked for. Rows of one answer
may be of different moments. That a key has no row is kept in the same way.

What is seldom asked for must cost next to nothing. A request for many keys is a scan unless a few of its keys, looked
at as a sample, say otherwise: its rows come from the table, none is looked up here or kept, and so nothing about it
has to be remembered while it is under way. In requests for few keys a key is kept when it is met for the second time.
"""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from services.feature.online.table import PartlyUnavailable
from services.resilience.call import Clock

ENTRY_BYTES = 250
"""What an entry costs beside its key and its row."""
_SHARE_OF_ONE = 64  # a row larger than this part of the room would push out too many others
_SECOND_CHANCES = 8  # in a row, so that making room takes no pause when every entry was used
_FEW_KEYS = 16  # of one request, which are all looked up; of more keys so many are the sample
_MOSTLY = 0.75  # the part of a sample that tells a request for hot keys from a scan that met some by chance


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """max_entries, max_bytes: of all rows together. max_age_s: from sending a row's read to its last use, seconds."""

    max_entries: int = 20_000
    max_bytes: int = 64 * 2**20
    max_age_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_entries", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.max_age_s < math.inf:
            raise ValueError(f"max_age_s must be above 0 s and finite, got {self.max_age_s}")


class CacheStatistics(NamedTuple):
    """hits, misses: keys answered from memory and from the table while the table's changes were being told.

    invalidations: entries dropped because their key changed. evictions: entries that made room for others.
    drops: how often all were dropped, because the store was emptied or its changes were no longer told.
    entries, bytes: of now.
    """

    hits: int
    misses: int
    invalidations: int
    evictions: int
    drops: int
    entries: int
    bytes: int


class ReadsRows(Protocol):
    """The part of `services.feature.online.table.Table` that is needed here."""

    def fetch(self, keys: Sequence[str], timeout_s: float) -> Awaitable[list[bytes | None]]: ...


class RowCache:
    """Reads through to a table and keeps what is read often. Belongs to one event loop.

    Empty and of no effect until `follow` and `renew` are called; memory and the work per change are bounded, the
    latter by how many fetches are under way at once, which is up to the caller.
    """

    def __init__(self, table: ReadsRows, limits: CacheLimits, clock: Clock = time.monotonic) -> None:
        self._table, self._limits, self._clock = table, limits, clock
        self._largest = limits.max_bytes // _SHARE_OF_ONE
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # in the order in which they are looked at for room
        self._bytes = 0
        self._door = _Doorkeeper(limits.max_entries)
        self._reads: dict[int, set[str]] = {}  # per fetch under way, the keys that may still be kept
        self._next_read = 0
        self._following = False
        self._usable_until = -math.inf
        self._hits = self._misses = self._invalidations = self._evictions = self._drops = 0

    @property
    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            self._hits,
            self._misses,
            self._invalidations,
            self._evictions,
            self._drops,
            len(self._entries),
            self._bytes,
        )

    def peek(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """The value of each key as `fetch` has it, if all are here; None if one is not. Never waits."""
        now = self._clock()
        if now >= self._usable_until:
            return None
        get, rows = self._entries.get, []
        for key in keys:
            entry = get(key)
            if entry is None or entry.until <= now:
                return None
            entry.used = True
            rows.append(entry.row)
        self._hits += len(rows)
        return rows

    async def fetch(
        self, keys: Sequence[str], timeout_s: float, requests: Iterable[Sequence[str]] = ()
    ) -> list[bytes | None]:
        """The value of each key, None where there is none; the table is asked for those that are not here.

        requests: what was asked for together, where keys are those of several requests.
        Raises what the table raises, PartlyUnavailable with what is here in its place.
        """
        if not self._following:
            return await self._table.fetch(keys, timeout_s)
        now = self._clock()
        known, kept = self._look_up(requests or (keys,), now)
        if not known:
            self._misses += len(keys)
            return await self._read(keys, kept, timeout_s, now)
        absent = [key for key in keys if key not in known]
        self._hits += len(keys) - len(absent)
        if absent:
            self._misses += len(absent)
            try:
                known.update(zip(absent, await self._read(absent, kept, timeout_s, now), strict=True))
            except PartlyUnavailable as error:
                known.update(zip(absent, error.values, strict=True))
                raise PartlyUnavailable(str(error), [known[key] for key in keys], error.failed) from None
        return [known[key] for key in keys]

    def follow(self) -> None:
        """From now on every change is told, by `invalidate`, `drop` or `lose`."""
        self._following = True

    def renew(self, until: float) -> None:
        """What is here may be served until then, on the clock; `until` less the lease is how far all was told."""
        self._usable_until = until

    def invalidate(self, keys: Collection[str]) -> None:
        """These keys changed. Also for a writer in this process that wants to read what it wrote at once."""
        for key in keys:
            if key in self._entries:
                self._forget(key)
                self._invalidations += 1
        for kept in self._reads.values():
            kept.difference_update(keys)

    def drop(self) -> None:
        """Any key may have changed."""
        self._entries.clear()
        self._bytes = 0
        self._drops += 1
        for kept in self._reads.values():
            kept.clear()

    def lose(self) -> None:
        """Changes are no longer told: nothing is served or kept until `follow` and `renew`."""
        if self._following:
            self._following = False
            self._usable_until = -math.inf
            self.drop()

    def _look_up(self, requests: Iterable[Sequence[str]], now: float) -> tuple[dict[str, bytes | None], set[str]]:
        """Rows that are here, and the keys whose rows are to be kept when they have been read."""
        known: dict[str, bytes | None] = {}
        kept: set[str] = set()
        get, usable = self._entries.get, now < self._usable_until
        for keys in requests:
            if len(keys) > _FEW_KEYS and self._is_scan(keys):
                continue
            new: list[str] = []
            for key in keys:
                entry = get(key)
                if entry is None:
                    new.append(key)
                elif usable and entry.until > now:
                    entry.used = True
                    known[key] = entry.row
                else:  # too old to serve, and asked for again
                    kept.add(key)
            if new:
                kept |= self._door.met_before(new)
        return known, kept

    def _is_scan(self, keys: Sequence[str]) -> bool:
        sample = keys[:: -(-len(keys) // _FEW_KEYS)]
        met = self._door.met_before(sample)
        met.update(self._entries.keys() & sample)
        return len(met) < _MOSTLY * len(sample)

    async def _read(self, keys: Sequence[str], kept: set[str], timeout_s: float, sent_at: float) -> list[bytes | None]:
        """Rows from the table; from `kept`, meanwhile, whoever hears of a change takes the key.

        Every key that may be kept is in `kept` before the read is sent, so no change between sending and answer is
        missed; where nothing may be kept, nothing has to be heard.
        """
        if not kept:
            return await self._table.fetch(keys, timeout_s)
        self._next_read = read = self._next_read + 1
        self._reads[read] = kept
        try:
            rows = await self._table.fetch(keys, timeout_s)
        finally:
            del self._reads[read]
        if kept:
            until = sent_at + self._limits.max_age_s
            for key, row in zip(keys, rows, strict=True):
                if key in kept:
                    self._keep(key, row, until)
        return rows

    def _keep(self, key: str, row: bytes | None, until: float) -> None:
        size = ENTRY_BYTES + sys.getsizeof(key) + sys.getsizeof(row)
        old = self._entries.get(key)
        if old is not None:
            if old.until >= until:  # of two reads that were under way at once, the later one counts
                return
            self._forget(key)
        if size > self._largest:
            return
        self._entries[key] = _Entry(row, until, size)
        self._bytes += size
        while len(self._entries) > self._limits.max_entries or self._bytes > self._limits.max_bytes:
            self._evict()

    def _evict(self) -> None:
        for _ in range(_SECOND_CHANCES):
            key, entry = next(iter(self._entries.items()))
            if not entry.used:
                break
            entry.used = False
            self._entries.move_to_end(key)
        self._forget(next(iter(self._entries)))
        self._evictions += 1

    def _forget(self, key: str) -> None:
        self._bytes -= self._entries.pop(key).size


class _Entry:
    """A row, or that there is none. used: since it was last looked at for room."""

    __slots__ = ("row", "size", "until", "used")

    def __init__(self, row: bytes | None, until: float, size: int) -> None:
        self.row, self.until, self.size, self.used = row, until, size, False


class _Doorkeeper:
    """Tells keys that were met lately from new ones, so that a scan does not displace what is asked for often.

    Remembers hashes of the last one to two times `size` keys; that two keys may share one costs a place, no more.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: set[int] = set()
        self._old: set[int] = set()

    def met_before(self, keys: Collection[str]) -> set[str]:
        """Those of the keys that were met before; all of them are from now on."""
        hashes, young, old = list(map(hash, keys)), self._young, self._old
        known: set[str] = set()
        if not (young.isdisjoint(hashes) and old.isdisjoint(hashes)):
            known.update(key for key, met in zip(keys, hashes, strict=True) if met in young or met in old)
        young.update(hashes)
        if len(young) >= self._size:
            self._old, self._young = young, set()
        return known
