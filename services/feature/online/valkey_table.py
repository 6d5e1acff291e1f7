"""A Table in one Valkey or Redis, over one connection."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from services.feature.online.table import HEAD_BYTES
from services.feature.online.valkey import CommandError, Commands, Reply, Word
from services.resilience.errors import DeadlineExceeded

# one script call or MGET holds the store's only thread; longer ones let nobody else in
_ROWS_PER_WRITE = 128
_KEYS_PER_READ = 4096
_WRITES_AT_ONCE = 4
# larger commands gain no speed; four of these keep the store busy while the next is packed
ROWS_PER_LOAD = 512
BYTES_PER_LOAD = 256 * 2**10
_LOADS_AT_ONCE = 4
_KEYS_PER_SCAN = 512
_STEP_TIMEOUT_S = 5.0  # of a walk through all keys, which may take minutes where nothing is wrong
_GLOB = re.compile(r"[*?\[\]\\^-]")


@dataclass(frozen=True, slots=True)
class Script:
    """A script of the store, and the name under which it keeps it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


# A row is replaced unless it has the same schema and has counted later events. A row of another schema can no longer
# be read, so it never stands in the way. ARGV: the rows, then one expiry in milliseconds since 1970 per row, 0 for
# none. Answers how many rows were kept.
KEEP_NEWEST = Script(f"""
local n, kept = #KEYS, 0
for i = 1, n do
  local row, old = ARGV[i], redis.call('GETRANGE', KEYS[i], 0, {HEAD_BYTES - 1})
  if #old < {HEAD_BYTES} or string.sub(old, 1, {HEAD_BYTES - 8}) ~= string.sub(row, 1, {HEAD_BYTES - 8})
     or struct.unpack('<i8', old, {HEAD_BYTES - 7}) <= struct.unpack('<i8', row, {HEAD_BYTES - 7}) then
    if ARGV[n + i] == '0' then
      redis.call('SET', KEYS[i], row)
    else
      redis.call('SET', KEYS[i], row, 'PXAT', ARGV[n + i])
    end
    kept = kept + 1
  end
end
return kept
""")

# ARGV: how many fields are expected, then per expected field its name and value, empty for none; then the names and
# values to set. Answers whether they were set.
SWAP = Script("""
local n = tonumber(ARGV[1])
for i = 2, 2 * n, 2 do
  if (redis.call('HGET', KEYS[1], ARGV[i]) or '') ~= ARGV[i + 1] then return 0 end
end
for i = 2 * n + 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
""")
SCRIPTS = (KEEP_NEWEST, SWAP)


class ValkeyTable:
    """Values are strings and maps are hashes."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def ping(self, timeout_s: float) -> None:
        await self._commands.call("PING", timeout_s=timeout_s)

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """One MGET, or several where keys are very many."""
        call = self._commands.call
        if len(keys) <= _KEYS_PER_READ:
            return cast("list[bytes | None]", await call("MGET", *keys, timeout_s=timeout_s)) if keys else []
        parts = [keys[start : start + _KEYS_PER_READ] for start in range(0, len(keys), _KEYS_PER_READ)]
        replies = await asyncio.gather(*(call("MGET", *part, timeout_s=timeout_s) for part in parts))
        return list(itertools.chain.from_iterable(replies))

    async def keep_newest(
        self, keys: Sequence[str], rows: Sequence[bytes], expiries_ms: Sequence[int], timeout_s: float
    ) -> int:
        deadline = _deadline(timeout_s)
        starts = range(0, len(rows), _ROWS_PER_WRITE)
        chunks = (slice(start, start + _ROWS_PER_WRITE) for start in starts)
        kept = 0
        while group := list(itertools.islice(chunks, _WRITES_AT_ONCE)):
            left_s = _left_s(deadline, timeout_s)
            counts = await asyncio.gather(
                *(self._run(KEEP_NEWEST, keys[c], (*rows[c], *expiries_ms[c]), left_s) for c in group)
            )
            kept += sum(map(int, counts))
        return kept

    async def load(self, keys: Sequence[str], rows: Sequence[bytes], timeout_s: float) -> None:
        """MSETs of a few hundred rows, a few of them under way at once."""
        deadline = _deadline(timeout_s)
        under_way: deque[asyncio.Future[Reply]] = deque()
        try:
            for part in load_parts(keys, rows):
                if len(under_way) == _LOADS_AT_ONCE:
                    await under_way.popleft()
                words = paired(zip(keys[part], rows[part], strict=True))
                left_s = _left_s(deadline, timeout_s)
                under_way.append(asyncio.ensure_future(self._commands.call("MSET", *words, timeout_s=left_s)))
            while under_way:
                await under_way.popleft()
        finally:
            for reply in under_way:
                reply.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)  # none is left unheard

    async def drop(self, prefix: str, timeout_s: float) -> int:
        """SCAN and UNLINK; see `sweep`."""

        async def unlink(keys: Sequence[bytes], left_s: float) -> int:
            return int(await self._commands.call("UNLINK", *keys, timeout_s=left_s))

        return await sweep(self._commands, prefix, unlink, timeout_s)

    def keys(self, prefix: str, timeout_s: float) -> AsyncIterator[list[str]]:
        return listed(self._commands, prefix, timeout_s)

    async def read_map(self, name: str, timeout_s: float) -> dict[str, bytes]:
        return map_of(await self._commands.call("HGETALL", name, timeout_s=timeout_s))

    async def write_map(self, name: str, fields: Mapping[str, bytes], timeout_s: float) -> None:
        if fields:
            await self._commands.call("HSET", name, *paired(fields.items()), timeout_s=timeout_s)

    async def swap_map(
        self, name: str, before: Mapping[str, bytes | None], fields: Mapping[str, bytes], timeout_s: float
    ) -> bool:
        return bool(await self._run(SWAP, [name], swap_words(before, fields), timeout_s))

    async def _run(self, script: Script, keys: Sequence[str], arguments: Sequence[Word], timeout_s: float) -> Reply:
        words: tuple[Word, ...] = (len(keys), *keys, *arguments)
        try:
            return await self._commands.call("EVALSHA", script.sha, *words, timeout_s=timeout_s)
        except CommandError as error:
            if error.code != "NOSCRIPT":
                raise
            return await self._commands.call("EVAL", script.text, *words, timeout_s=timeout_s)


def load_parts(keys: Sequence[str], rows: Sequence[bytes]) -> Iterator[slice]:
    """Which rows travel together: a few hundred, fewer where they are large."""
    row_bytes = max(map(len, rows), default=0) + 64
    step = max(1, min(ROWS_PER_LOAD, BYTES_PER_LOAD // row_bytes))
    return (slice(start, start + step) for start in range(0, len(keys), step))


def paired(items: Iterable[tuple[Word, Word]]) -> Iterator[Word]:
    """Keys and values as MSET and HSET take them."""
    return itertools.chain.from_iterable(items)


def map_of(reply: Sequence[bytes]) -> dict[str, bytes]:
    """The reply to HGETALL. A name that is not text is kept readable, as only its owner can mend it."""
    return {name.decode(errors="replace"): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def swap_words(before: Mapping[str, bytes | None], fields: Mapping[str, bytes]) -> list[Word]:
    """The arguments of SWAP."""
    expected = ((name, value or b"") for name, value in before.items())
    return [len(before), *paired(expected), *paired(fields.items())]


async def sweep(
    commands: Commands, prefix: str, unlink: Callable[[Sequence[bytes], float], Awaitable[int]], timeout_s: float
) -> int:
    """Removes the keys of one store that start with `prefix`; how many there were.

    A few hundred keys at a time, and after each step a pause as long as the step took: at least half of the store's
    time stays with those who read. unlink: told keys and how long it may take, seconds.
    """
    if not prefix:
        raise ValueError("prefix must not be empty: that would remove everything")
    deadline = _deadline(timeout_s)
    pattern = _GLOB.sub(r"\\\g<0>", prefix) + "*"
    cursor: Word = 0
    dropped = 0
    while True:
        began = time.monotonic()
        left_s = min(_STEP_TIMEOUT_S, _left_s(deadline, timeout_s))
        cursor, keys = await commands.call("SCAN", cursor, "MATCH", pattern, "COUNT", _KEYS_PER_SCAN, timeout_s=left_s)
        if keys:
            dropped += await unlink(keys, left_s)
        if int(cursor) == 0:
            return dropped
        await asyncio.sleep(time.monotonic() - began)


async def listed(commands: Commands, prefix: str, timeout_s: float) -> AsyncIterator[list[str]]:
    """The keys of one store that start with `prefix`; it pauses as `sweep` does."""
    deadline = _deadline(timeout_s)
    pattern = _GLOB.sub(r"\\\g<0>", prefix) + "*"
    cursor: Word = 0
    while True:
        began = time.monotonic()
        left_s = min(_STEP_TIMEOUT_S, _left_s(deadline, timeout_s))
        cursor, keys = await commands.call("SCAN", cursor, "MATCH", pattern, "COUNT", _KEYS_PER_SCAN, timeout_s=left_s)
        took_s = time.monotonic() - began
        yield [key.decode(errors="replace") for key in keys]
        if int(cursor) == 0:
            return
        await asyncio.sleep(took_s)


def _deadline(timeout_s: float) -> float:
    return time.monotonic() + timeout_s


def _left_s(deadline: float, timeout_s: float) -> float:
    """Raises DeadlineExceeded where nothing is left."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded(f"the store did not finish within {timeout_s * 1e3:.0f} ms")
    return left_s
