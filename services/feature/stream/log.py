"""The event log: what was acknowledged, in one order per source, until it is applied and archived.

    tf:<mesh>:log:<source>             stream; entry "<position>-0" holds one event
    tf:<mesh>:position:<source>        the last position that was given out, from 1
    tf:<mesh>:seen:<source>:<page>     bitmap: which of the sequence numbers page * 2^16 ... are in the log, or were
    tf:<mesh>:seen:<source>:full       set: pages whose numbers are all seen; their bitmaps are gone
    tf:<mesh>:promise:<source>         hash: a producer's watermark_us, and the position it holds from

An append is one script: that an event is new and that it is in the log become true in the same step, so no crash can
come between. A store that writes its append-only file before it answers has then kept both or neither. The keys of a
source are on different nodes of a cluster; the log needs a store of one node, or a primary with replicas. A replica
that takes over may lack the last events that were acknowledged: producers have to send again what they sent in the last
seconds before. It lacks the states that counted these too, so that none is skipped; what was archived is told
(`services.feature.stream.archive`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from services.feature.online.valkey import CommandError, Commands, Word
from services.feature.stream.scripts import Script, run
from services.resilience.errors import Unavailable

MAX_SEQUENCE = 2**63 - 1
MAX_US = 2**53  # moments that a double holds exactly
DEFAULT_MAX_EVENTS = 1_000_000
_VERSION = b"\x01"
_PAGE_BITS = 16
_FIELD = "e"
# a script holds the store's only thread; this many take one or two milliseconds
_EVENTS_PER_CALL = 512
_FULL = -1

# KEYS: log, position, promise, full pages, then pages. ARGV: the most entries of the log, how many groups; then per
# group: how many events, watermark_us; and per event: the index of its page's key, the page, its bit, its entry.
# A group is appended whole or, where the log has no room for what is new of it, not at all; nor is what follows it.
# What may fail comes before what tells that it was done: XADD before SETBIT. Answers per group how many were new or -1,
# then the last position and the log's length.
_APPEND = Script(f"""
local log, counter, promise, full = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local most, groups, at = tonumber(ARGV[1]), tonumber(ARGV[2]), 3
local length, answer, is_full, touched = redis.call('XLEN', log), {{}}, {{}}, {{}}
for group = 1, groups do
  local count, watermark, fresh = tonumber(ARGV[at]), ARGV[at + 1], {{}}
  at = at + 2
  for i = at, at + 4 * count - 4, 4 do
    local page = KEYS[tonumber(ARGV[i])]
    if is_full[page] == nil then is_full[page] = redis.call('SISMEMBER', full, ARGV[i + 1]) == 1 end
    if not is_full[page] and redis.call('GETBIT', page, ARGV[i + 2]) == 0 then fresh[#fresh + 1] = i end
  end
  at = at + 4 * count
  if length + #fresh > most then
    for rest = group, groups do answer[rest] = {_FULL} end
    break
  end
  local new = 0
  for _, i in ipairs(fresh) do
    local page = KEYS[tonumber(ARGV[i])]
    if redis.call('GETBIT', page, ARGV[i + 2]) == 0 then
      local position = redis.call('INCR', counter)
      redis.call('XADD', log, string.format('%.0f-0', position), '{_FIELD}', ARGV[i + 3])
      redis.call('SETBIT', page, ARGV[i + 2], 1)
      touched[page] = ARGV[i + 1]
      new = new + 1
    end
  end
  length = length + new
  answer[group] = new
  if watermark ~= '0' and tonumber(watermark) > tonumber(redis.call('HGET', promise, 'us') or '0') then
    redis.call('HSET', promise, 'us', watermark, 'position', redis.call('GET', counter) or '0')
  end
end
for page, number in pairs(touched) do
  -- number 0 does not exist, so that its page is full with one bit less
  if redis.call('BITCOUNT', page) >= {2**_PAGE_BITS} - (number == '0' and 1 or 0) then
    redis.call('SADD', full, number)
    redis.call('UNLINK', page)
  end
end
answer[#answer + 1] = tonumber(redis.call('GET', counter) or '0')
answer[#answer + 1] = length
return answer
""")


class LogFull(Exception):
    """The log has no room; nothing of the group was appended."""

    def __init__(self, source: str, length: int, most: int) -> None:
        super().__init__(
            f"the log of source {source!r} is full: it holds {length} events and may hold {most}; "
            "it has room again when events are applied and archived"
        )


class NotDurable(Unavailable):
    """The store would lose what it acknowledged."""


class Logged(msgspec.Struct, frozen=True, array_like=True):
    """One event as it was sent. Columns by name, as definitions change while events wait; absent ones are null."""

    sequence: int
    event_us: int
    known_us: int
    entities: dict[str, str]
    labels: dict[str, str]
    values: dict[str, float]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Logged).decode


class Entry(NamedTuple):
    """event: None where the entry cannot be decoded."""

    position: int
    event: Logged | None


class Appended(NamedTuple):
    """What became of one group. duplicates: events whose sequence number was there already."""

    accepted: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Group:
    """Events that are appended together or not at all. watermark_us: the producer's promise, 0 for none."""

    events: Sequence[Logged]
    watermark_us: int = 0


class Promise(NamedTuple):
    """Every event known before watermark_us is in the log at or below `position`, says the producer."""

    watermark_us: int
    position: int


class EventLog:
    """The logs of one mesh, source by source.

    Every method raises Unavailable, DeadlineExceeded or Refused as `Valkey.call` does.
    """

    def __init__(self, commands: Commands, mesh: str, max_events: int = DEFAULT_MAX_EVENTS) -> None:
        """max_events: the most entries of one source's log."""
        if max_events < 1:
            raise ValueError(f"max_events must be at least 1, got {max_events}")
        self._commands, self._mesh, self._max_events = commands, mesh, max_events

    def key(self, source: str, what: str = "log") -> str:
        return f"tf:{self._mesh}:{what}:{source}"

    async def append(self, source: str, groups: Sequence[Group], timeout_s: float) -> list[Appended | LogFull]:
        """What became of each group, in order; after one that found the log full, all did.

        The events are as durable as the store is: see `check_durable`. Where this raises, each group may or may not
        have been appended; to append it again is safe.
        """
        answers: list[Appended | LogFull] = []
        for part in _parts(groups):
            if answers and isinstance(answers[-1], LogFull):  # what follows must not overtake
                answers += [answers[-1]] * len(part)
                continue
            answers += await self._append(source, part, timeout_s)
        return answers

    async def read(
        self, after: Mapping[str, int], most: int, block_s: float, timeout_s: float
    ) -> dict[str, list[Entry]]:
        """Up to `most` entries of each source behind the position given for it, in order.

        block_s: how long to wait for the first, seconds, 0 for not at all; then give a connection of its own, as
        whatever else is sent there waits behind it. Empty where none came.
        """
        wait: tuple[Word, ...] = ("BLOCK", max(1, round(block_s * 1e3))) if block_s > 0 else ()
        keys = {self.key(source).encode(): source for source in after}
        ids = [f"{position}-0" for position in after.values()]
        words: tuple[Word, ...] = ("COUNT", most, *wait, "STREAMS", *keys, *ids)
        reply = await self._commands.call("XREAD", *words, timeout_s=timeout_s + block_s)
        return {keys[key]: _entries(entries) for key, entries in reply or ()}

    async def last_position(self, source: str, timeout_s: float) -> int:
        """0 before the first event."""
        return int(await self._commands.call("GET", self.key(source, "position"), timeout_s=timeout_s) or 0)

    async def first_position(self, source: str, timeout_s: float) -> int:
        """Of the oldest entry that is still there; 0 where there is none."""
        reply = await self._commands.call("XRANGE", self.key(source), "-", "+", "COUNT", 1, timeout_s=timeout_s)
        return _position(reply[0][0]) if reply else 0

    async def length(self, source: str, timeout_s: float) -> int:
        return int(await self._commands.call("XLEN", self.key(source), timeout_s=timeout_s))

    async def promise(self, source: str, timeout_s: float) -> Promise:
        """The latest one; of 0 where there is none."""
        words = (self.key(source, "promise"), "us", "position")
        us, position = await self._commands.call("HMGET", *words, timeout_s=timeout_s)
        return Promise(int(us or 0), int(position or 0))

    async def trim(self, source: str, position: int, timeout_s: float) -> int:
        """Removes what is at or below `position`; how many entries that were. Their numbers stay seen."""
        words = (self.key(source), "MINID", f"{position + 1}-0")
        return int(await self._commands.call("XTRIM", *words, timeout_s=timeout_s))

    async def _append(self, source: str, groups: Sequence[Group], timeout_s: float) -> list[Appended | LogFull]:
        prefix = self.key(source, "seen")
        keys = [self.key(source), self.key(source, "position"), self.key(source, "promise"), f"{prefix}:full"]
        pages: dict[int, int] = {}
        words: list[Word] = [self._max_events, len(groups)]
        for group in groups:
            words += (len(group.events), group.watermark_us)
            for event in group.events:
                page, bit = event.sequence >> _PAGE_BITS, event.sequence & (2**_PAGE_BITS - 1)
                if (index := pages.get(page)) is None:
                    keys.append(f"{prefix}:{page}")
                    index = pages[page] = len(keys)
                words += (index, page, bit, _VERSION + _encode(event))
        *counts, _, length = await run(self._commands, _APPEND, keys, words, timeout_s)
        full = LogFull(source, length, self._max_events)
        return [
            full if count == _FULL else Appended(count, len(group.events) - count)
            for group, count in zip(groups, counts, strict=True)
        ]


async def check_durable(commands: Commands, timeout_s: float) -> None:
    """Raises NotDurable where the store could lose an event that it has acknowledged, or cannot be asked."""
    asked = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
    try:
        reply = await commands.call("CONFIG", "GET", *asked, timeout_s=timeout_s)
    except CommandError as error:
        raise NotDurable(f"the store does not say whether it is durable: {error}") from None
    told = {name.decode(): value.decode() for name, value in zip(reply[::2], reply[1::2], strict=True)}
    for name, wanted in (("appendonly", "yes"), ("appendfsync", "always")):
        if told.get(name) != wanted:
            raise NotDurable(f"the store must run with {name} {wanted}, got {told.get(name)!r}")
    if told.get("maxmemory", "0") != "0" and told.get("maxmemory-policy", "").startswith("allkeys"):
        raise NotDurable(f"the store must not evict keys without expiry, got {told['maxmemory-policy']!r}")


def decode(entry: bytes | None) -> Logged | None:
    """The event, or None where the bytes are none."""
    if entry is None or not entry.startswith(_VERSION):
        return None
    try:
        event = _decode(memoryview(entry)[len(_VERSION) :])
    except msgspec.MsgspecError:
        return None
    known = 1 <= event.event_us <= event.known_us <= MAX_US and 1 <= event.sequence <= MAX_SEQUENCE
    return event if known else None


def _entries(reply: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[Entry]:
    return [Entry(_position(name), decode(fields[1] if len(fields) > 1 else None)) for name, fields in reply]


def _position(name: bytes) -> int:
    return int(name.partition(b"-")[0])


def _parts(groups: Sequence[Group]) -> Iterable[Sequence[Group]]:
    """Groups that travel together: a few hundred events, or one group."""
    size = itertools.accumulate(len(group.events) for group in groups)
    numbered = zip(size, groups, strict=True)
    for _, part in itertools.groupby(numbered, lambda pair: math.ceil(pair[0] / _EVENTS_PER_CALL)):
        yield [group for _, group in part]
