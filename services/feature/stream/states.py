"""The states of stream views in Valkey: written by compare-and-set, with how far each generation has counted.

    tf:<mesh>:applied:<source>   hash: <view>:<generation> -> the position up to which that generation has counted
                                       us -> known_us of the newest event counted; watermark -> a promise that holds
    tf:<mesh>:built              hash: <view>:<generation> -> the schema hash of its states, 16 hexadecimal digits
    tf:<mesh>:applier            the lease of whoever applies the log

A state carries the positions it has counted, and is replaced only where it still stands at those that the new one was
computed from. So nothing is lost or counted twice, whatever any number of appliers do and whenever they die. The
positions here are written after the states, and never go back: they say where to start, and how fresh the states are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from services.feature.define.definition import View
from services.feature.online.valkey import Commands, Word
from services.feature.stream.scripts import Script, run
from services.feature.tiles.state import POSITIONS

_HEAD_AT = 12
_STATES_PER_CALL = 64
_BYTES_PER_CALL = 512 * 2**10

# ARGV: the length of a head, then what is expected of each key, empty for none, then the states.
# Answers which were set.
_SWAP = Script("""
local n, last, done = #KEYS, tonumber(ARGV[1]) - 1, {}
for i = 1, n do
  if redis.call('GETRANGE', KEYS[i], 0, last) == ARGV[1 + i] then
    redis.call('SET', KEYS[i], ARGV[1 + n + i])
    done[i] = 1
  else
    done[i] = 0
  end
end
return done
""")

# ARGV: names and numbers. Each is set unless a larger one is there.
_RAISE = Script("""
for i = 1, #ARGV, 2 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '-1') < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
""")

# ARGV: the owner's token, milliseconds; 0 to give the lease back. Answers whether it is ours.
_LEASE = Script("""
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return 1
""")


class Applied(NamedTuple):
    """How far a source's events are counted.

    positions: per "<view>:<generation>". known_us: of the newest event counted. watermark_us: every event known before
    it is counted, says the producer. 0 where there is none.
    """

    positions: Mapping[str, int]
    known_us: int
    watermark_us: int


def numbered(view: str, generation: int) -> str:
    """A generation's name: "arrivals:7"."""
    return f"{view}:{generation}"


class StateStore:
    """The states of one mesh. Every method raises Unavailable, DeadlineExceeded or Refused as `Valkey.call` does."""

    def __init__(self, commands: Commands, mesh: str) -> None:
        self._commands, self._prefix = commands, f"tf:{mesh}:"

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        return list(await self._commands.call("MGET", *keys, timeout_s=timeout_s)) if keys else []

    async def swap(
        self, view: View, keys: Sequence[str], before: Sequence[bytes | None], after: Sequence[bytes], timeout_s: float
    ) -> list[bool]:
        """Sets each state if the one there stands where `before` did; which were set."""
        head = _HEAD_AT + 8 * (POSITIONS + len(view.sources))
        done: list[bool] = []
        for part in _parts(after):
            expected = [b"" if state is None else state[:head] for state in before[part]]
            done += map(bool, await run(self._commands, _SWAP, keys[part], (head, *expected, *after[part]), timeout_s))
        return done

    async def applied(self, source: str, timeout_s: float) -> Applied:
        reply = await self._commands.call("HGETALL", f"{self._prefix}applied:{source}", timeout_s=timeout_s)
        fields = {name.decode(): int(value) for name, value in zip(reply[::2], reply[1::2], strict=True)}
        return Applied(fields, fields.pop("us", 0), fields.pop("watermark", 0))

    async def raise_applied(
        self, source: str, positions: Mapping[str, int], known_us: int, watermark_us: int, timeout_s: float
    ) -> None:
        """Each number unless a larger one is there. Call it after the states were written."""
        numbers: Mapping[str, int] = {**positions, "us": known_us, "watermark": watermark_us}
        words: Iterable[Word] = itertools.chain.from_iterable(numbers.items())
        await run(self._commands, _RAISE, [f"{self._prefix}applied:{source}"], tuple(words), timeout_s)

    async def built(self, timeout_s: float) -> dict[str, int]:
        """The schema hash of each generation's states."""
        reply = await self._commands.call("HGETALL", f"{self._prefix}built", timeout_s=timeout_s)
        return {name.decode(): int(value, 16) for name, value in zip(reply[::2], reply[1::2], strict=True)}

    async def set_built(self, view: str, generation: int, schema_hash: int, timeout_s: float) -> None:
        """Call it before the generation is published."""
        words = (f"{self._prefix}built", numbered(view, generation), f"{schema_hash:016x}")
        await self._commands.call("HSET", *words, timeout_s=timeout_s)

    async def forget(self, view: View, generations: Iterable[int], timeout_s: float) -> None:
        """These generations are gone."""
        names = [numbered(view.name, generation) for generation in generations]
        for key in ("built", *(f"applied:{source.name}" for source in view.sources)):
            if names:
                await self._commands.call("HDEL", f"{self._prefix}{key}", *names, timeout_s=timeout_s)

    async def lease(self, owner: str, for_s: float, timeout_s: float) -> bool:
        """Takes or keeps the lease, or gives it back where for_s is 0; whether it is ours (or nobody's) now."""
        words = (owner, round(for_s * 1e3))
        return bool(await run(self._commands, _LEASE, [f"{self._prefix}applier"], words, timeout_s))


def _parts(states: Sequence[bytes]) -> list[slice]:
    """Which states travel together: a script holds the store's only thread."""
    parts: list[slice] = []
    start = size = 0
    for at, state in enumerate(states):
        if at > start and (at - start >= _STATES_PER_CALL or size + len(state) > _BYTES_PER_CALL):
            parts.append(slice(start, at))
            start, size = at, 0
        size += len(state)
    return [*parts, slice(start, len(states))] if states else []
