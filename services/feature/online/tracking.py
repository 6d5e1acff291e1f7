"""Listens to what changes in the store, and tells a cache.

A connection of its own speaks RESP3 and asks Valkey (or Redis 6 and later) with CLIENT TRACKING BCAST for the name of
every key under a prefix that is written, expires or is removed. Own writes are told like those of others.

Every _BEAT_S a PING is sent. Its answer travels behind all that was told before, so it proves that every change from
before the PING was sent has arrived, and extends the cache's lease to LEASE_S after that moment. A connection that
stalls without closing, a frozen store or a busy event loop thus stop the cache from serving, at the latest LEASE_S
after the last change it can have heard of; when answers arrive again it goes on, as nothing was lost. A connection
that is lost, or silent for _DEAD_S, may have lost changes: the cache drops everything, and stays out of use until a
new connection is told that tracking is on.

One connection hears of one server only. In a cluster each master would need its own, kept in step with the slots as
they move; there the cache is off, also where a server says only when it is reached that it is part of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Protocol, cast
from urllib.parse import urlsplit

import hiredis

from services.feature.online.cache import CacheLimits, ReadsRows, RowCache
from services.feature.online.valkey import FIRST_RETRY_S, LONGEST_RETRY_S, Address, Reply, Word
from services.resilience.call import Clock

log = logging.getLogger(__name__)

LEASE_S = 0.5
"""How old an answer of the cache can be, seconds."""
_BEAT_S = 0.1  # several a lease, so that one slow command of the store does not interrupt the cache
_DEAD_S = 2.0
_REFUSED_RETRY_S = 5.0  # one that is loading will tell soon; one that does not offer it will hardly learn it
_CHUNK_BYTES = 64 * 2**10  # about 1,000 keys: a fraction of a millisecond of the event loop

_INCOMPLETE = object()
_pack = cast("Callable[[tuple[Word, ...]], bytes]", hiredis.pack_command)


class Follower(Protocol):
    """What is told; `services.feature.online.cache.RowCache` says what each means."""

    def follow(self) -> None: ...
    def renew(self, until: float) -> None: ...
    def invalidate(self, keys: Collection[str]) -> None: ...
    def drop(self) -> None: ...
    def lose(self) -> None: ...


_TELLING = ("redis", "rediss", "unix")  # schemes of URLs that name one Valkey or Redis


class TrackingRefused(Exception):
    """The server answered that it will not tell of changes."""


@contextlib.asynccontextmanager
async def cached(table: ReadsRows, url: str, prefix: str, limits: CacheLimits | None) -> AsyncIterator[RowCache | None]:
    """A cache in front of `table`, told of its changes; None without limits, or where the table cannot tell.

    url: of the table. prefix: of the keys of its rows.
    """
    if limits is None or urlsplit(url).scheme not in _TELLING:
        yield None
        return
    cache = RowCache(table, limits)
    async with tracking(url, prefix, cache):
        yield cache


@contextlib.asynccontextmanager
async def tracking(url: str, prefix: str, follower: Follower, clock: Clock = time.monotonic) -> AsyncIterator[None]:
    """Within it, the follower is told of every change to keys that start with `prefix`, whenever the store is there.

    url: see Address.parse. clock: the follower's. Raises ValueError.
    """
    address = Address.parse(url)
    listener = asyncio.get_running_loop().create_task(_keep_listening(address, prefix, follower, clock))
    try:
        yield
    finally:
        listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listener


async def _keep_listening(address: Address, prefix: str, follower: Follower, clock: Clock) -> None:
    told, pause_s = "", FIRST_RETRY_S
    while True:
        began_at = clock()
        try:
            async with _connection(address, follower) as connection:
                await _listen(connection, prefix, follower, clock)
        except (OSError, TimeoutError, UnicodeError, hiredis.ProtocolError, TrackingRefused) as error:
            reason = str(error) or type(error).__name__
            if reason != told:
                log.warning("changes of the store are not told", extra={"store": str(address), "reason": reason})
            told = reason
            longest_s = _REFUSED_RETRY_S if isinstance(error, TrackingRefused) else LONGEST_RETRY_S
        finally:
            follower.lose()
        pause_s = FIRST_RETRY_S if clock() - began_at > _DEAD_S else min(2 * pause_s, longest_s)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))


async def _listen(connection: _Connection, prefix: str, follower: Follower, clock: Clock) -> None:
    """Until the connection is lost: raises OSError, TimeoutError, ProtocolError or TrackingRefused."""
    for command in connection.address.greeting():
        await connection.ask(*command)
    hello = await connection.ask("HELLO", 3)
    if hello.get("mode") != "standalone":
        raise TrackingRefused(f"a server in mode {hello.get('mode')!r} tells of its own share of the keys only")
    await connection.ask("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", prefix)
    follower.follow()
    log.info("changes of the store are told", extra={"store": str(connection.address)})
    while True:
        sent_at = clock()
        await connection.ask("PING")
        follower.renew(sent_at + LEASE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEAT_S):
                while True:
                    await connection.receive()


@contextlib.asynccontextmanager
async def _connection(address: Address, follower: Follower) -> AsyncIterator[_Connection]:
    async with asyncio.timeout(_DEAD_S):
        if address.path:
            reader, writer = await asyncio.open_unix_connection(address.path)
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.trust())
    try:
        yield _Connection(address, reader, writer, follower)
    finally:
        writer.transport.abort()


class _Connection:
    """One command at a time; what is told meanwhile goes to the follower at once and in order."""

    def __init__(
        self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, follower: Follower
    ) -> None:
        self.address = address
        self._reader, self._writer, self._follower = reader, writer, follower
        # any byte may be part of a key that others write
        self._parser = hiredis.Reader(encoding="utf-8", errors="surrogateescape", notEnoughData=_INCOMPLETE)
        self._replies: deque[Reply] = deque()

    async def ask(self, *command: Word) -> Reply:
        """The reply. Raises TrackingRefused where it is an error, TimeoutError after _DEAD_S, OSError at the end."""
        self._writer.write(_pack(command))
        async with asyncio.timeout(_DEAD_S):
            while not self._replies:
                await self.receive()
        reply = self._replies.popleft()
        if isinstance(reply, hiredis.ReplyError):
            raise TrackingRefused(f"the store at {self.address} answered: {reply}")
        return reply

    async def receive(self) -> None:
        """Waits for bytes, and takes in all that is complete."""
        data = await self._reader.read(_CHUNK_BYTES)
        if not data:
            raise ConnectionResetError(f"the store at {self.address} closed the connection")
        self._parser.feed(data)
        while (message := self._parser.gets()) is not _INCOMPLETE:
            if not isinstance(message, hiredis.PushNotification):
                self._replies.append(message)
            elif message[0] == "invalidate":
                self._tell(message[1])

    def _tell(self, keys: list[str] | None) -> None:
        if keys is None:
            self._follower.drop()
        else:
            self._follower.invalidate(keys)
