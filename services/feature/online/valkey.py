"""One connection to Valkey or Redis, kept open, for calls that count microseconds.

Commands are pipelined: each is written at once, and replies are matched in order. A command that times out keeps its
place in that order, and its late reply is dropped. While there is no connection every command fails at once, so that
callers can degrade rather than wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from services.resilience.errors import CallError, DeadlineExceeded, Reason, Refused, Unavailable

log = logging.getLogger(__name__)

Word = str | bytes | int
Reply = Any  # bytes, int, None, or a list of these

FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5  # a store that came back is found within this time
MAX_SILENT_TIMEOUTS = 4  # commands in a row without a byte from the store: the connection is taken for dead
MAX_IN_FLIGHT = 4096  # commands, those that timed out and still hold a place included
MAX_UNSENT_BYTES = 32 * 2**20
_INCOMPLETE = object()
_FULL_RETRY_S = 1.0  # a full store has room again when somebody makes some

# its type stub knows commands of one word only
_pack = cast("Callable[[tuple[Word, ...]], bytes]", hiredis.pack_command)


class CommandError(Unavailable):
    """The store answered a command with an error.

    code: its first word, for example "NOSCRIPT". told: all of it.
    """

    def __init__(self, address: str, reply: hiredis.ReplyError) -> None:
        super().__init__(f"the store at {address} answered: {reply}")
        self.told = str(reply)
        self.code = self.told.partition(" ")[0]


@dataclass(frozen=True, slots=True)
class Address:
    """Where the store is.

    path: of a Unix socket; host and port are used where it is empty.
    tls: whether to speak TLS. ca: a file of certificates to trust instead of the system's.
    """

    path: str = ""
    host: str = "localhost"
    port: int = 6379
    database: int = 0
    username: str = ""
    password: str = ""
    tls: bool = False
    ca: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Address:
        """From "unix:///path/valkey.sock?db=0", "redis://user:password@host:port/0" or "rediss://host?ca=/path".

        Raises ValueError saying what is allowed; the value is not repeated, as it may hold a password.
        """
        parts = urlsplit(url)
        allowed = "must be unix:///path?db=N or redis[s]://[user:password@]host[:port][/N]"
        options = parse_qs(parts.query)
        try:
            port = parts.port or 6379
            told = options.get("db", ["0"])[0] if parts.scheme == "unix" else parts.path.strip("/") or "0"
            database = int(told)
        except ValueError as error:
            raise ValueError(f"the store's URL {allowed}: {error}") from None
        if parts.scheme not in ("unix", "redis", "rediss") or (parts.scheme == "unix" and not parts.path):
            raise ValueError(f"the store's URL {allowed}, got scheme {parts.scheme!r}")
        if database < 0:
            raise ValueError(f"the store's URL {allowed}, got database {database}")
        return cls(
            path=unquote(parts.path) if parts.scheme == "unix" else "",
            host=parts.hostname or "localhost",
            port=port,
            database=database,
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            tls=parts.scheme == "rediss",
            ca=options.get("ca", [""])[0] if parts.scheme == "rediss" else "",
        )

    def greeting(self) -> list[tuple[Word, ...]]:
        """What a new connection says first. PING last: a store that is loading or wants a password refuses it."""
        commands: list[tuple[Word, ...]] = []
        if self.password:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        return [*commands, ("PING",)]

    def trust(self) -> ssl.SSLContext | None:
        """Raises OSError where the file of certificates cannot be read."""
        return ssl.create_default_context(cafile=self.ca or None) if self.tls else None


class Commands(Protocol):
    """What a table needs of a client."""

    def call(self, *command: Word, timeout_s: float) -> Awaitable[Reply]: ...


class Valkey:
    """A connection that is kept open from `async with` until its end. Belongs to one event loop."""

    def __init__(
        self, url: str | Address, *, connect_timeout_s: float = 1.0, max_in_flight: int = MAX_IN_FLIGHT
    ) -> None:
        """url: see Address.parse. connect_timeout_s: for connecting and greeting. Raises ValueError."""
        self._address = Address.parse(url) if isinstance(url, str) else url
        self._connect_timeout_s = connect_timeout_s
        self._max_in_flight = max_in_flight
        self._link: _Link | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._down_because = "not connected yet"

    def call(self, *command: Word, timeout_s: float) -> asyncio.Future[Reply]:
        """The future reply. Cancel it to stop waiting; the command may still run.

        The future fails with DeadlineExceeded after timeout_s, Unavailable where the connection is lost, and
        CommandError where the store answers with an error. Raises Unavailable at once without a connection, and
        Refused where too much is under way.
        """
        return self._open_link().send(command, timeout_s)

    def pipeline(self, commands: Sequence[tuple[Word, ...]], timeout_s: float) -> asyncio.Future[list[Reply]]:
        """The future replies to several commands, which leave together and count as one command under way.

        Where the store answers a command with an error, that error stands in the place of its reply. Otherwise as
        `call`. There must be at least one command.
        """
        return self._open_link().send_all(commands, timeout_s)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._link is None or not self._link.waiting

    async def connected(self, timeout_s: float) -> None:
        """Returns when there is a connection. Raises Unavailable saying why there is none after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            reason = f"the store at {self._address} cannot be reached: {self._down_because}"
            raise Unavailable(reason) from None

    async def __aenter__(self) -> Valkey:
        self._keeper = asyncio.get_running_loop().create_task(self._keep_connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeper
        if self._link is not None:
            self._link.drop("closed")
            await self._link.closed
            self._link = None

    def _open_link(self) -> _Link:
        link = self._link
        if link is None:
            raise Unavailable(f"the store at {self._address} cannot be reached: {self._down_because}")
        if len(link.waiting) >= self._max_in_flight or link.clogged:
            raise Refused(Reason.QUEUE_FULL, f"{len(link.waiting)} commands wait for the store at {self._address}")
        return link

    async def _keep_connected(self) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                link = await self._connect()
            except (OSError, TimeoutError, UnicodeError, Unavailable, DeadlineExceeded) as error:
                reason = str(error) or type(error).__name__
                if reason != self._down_because:
                    log.warning("store unreachable", extra={"store": str(self._address), "reason": reason})
                self._down_because = reason
                # spread, so that replicas do not come back to a starting store in step
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)
                continue
            self._link = link
            self._up.set()
            log.info("store connected", extra={"store": str(self._address)})
            self._down_because = await asyncio.shield(link.closed)
            self._link = None
            self._up.clear()
            log.warning("store connection lost", extra={"store": str(self._address), "reason": self._down_because})
            pause_s = FIRST_RETRY_S
            await asyncio.sleep(pause_s)

    async def _connect(self) -> _Link:
        loop, address = asyncio.get_running_loop(), self._address

        def new_link() -> _Link:
            return _Link(str(address), loop)

        async with asyncio.timeout(self._connect_timeout_s):
            if address.path:
                _, link = await loop.create_unix_connection(new_link, address.path)
            else:
                _, link = await loop.create_connection(new_link, address.host, address.port, ssl=address.trust())
            try:
                for command in address.greeting():
                    await link.send(command, self._connect_timeout_s)
            except BaseException:
                link.drop("the greeting failed")
                raise
        return link


def _error(address: str, reply: hiredis.ReplyError) -> CallError:
    error = CommandError(address, reply)
    if error.code != "OOM":
        return error
    # nothing is wrong with a full store but that it takes no more: it still answers reads
    detail = f"the store at {address} is full (its maxmemory is reached) and takes no writes; reads go on"
    return Refused(Reason.OVERLOADED, detail, _FULL_RETRY_S)


class _Waiting(NamedTuple):
    """Who waits for `wanted` replies. replies: those that came; None where a single one is wanted."""

    future: asyncio.Future[Reply]
    timer: asyncio.TimerHandle
    wanted: int
    replies: list[Reply] | None


class _Link(asyncio.Protocol):
    """One connection, from connect to loss."""

    def __init__(self, address: str, loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: deque[_Waiting] = deque()
        self.clogged = False
        # why the connection ended
        self.closed: asyncio.Future[str] = loop.create_future()
        self._address, self._loop = address, loop
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._transport: asyncio.Transport
        self._silent_timeouts = 0
        self._why = "the store closed the connection"

    def send(self, command: tuple[Word, ...], timeout_s: float) -> asyncio.Future[Reply]:
        return self._write(_pack(command), 1, None, timeout_s)

    def send_all(self, commands: Sequence[tuple[Word, ...]], timeout_s: float) -> asyncio.Future[list[Reply]]:
        return self._write(b"".join(map(_pack, commands)), len(commands), [], timeout_s)

    def _write(self, data: bytes, wanted: int, replies: list[Reply] | None, timeout_s: float) -> asyncio.Future[Reply]:
        if self.closed.done():
            raise Unavailable(f"the store at {self._address} cannot be reached: {self.closed.result()}")
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._transport.write(data)
        timer = self._loop.call_later(timeout_s, self._expire, future, timeout_s)
        self.waiting.append(_Waiting(future, timer, wanted, replies))
        return future

    def drop(self, why: str) -> None:
        """Ends the connection now; everyone who waits hears why."""
        self._why = why
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def pause_writing(self) -> None:
        self.clogged = True

    def resume_writing(self) -> None:
        self.clogged = False

    def data_received(self, data: bytes) -> None:
        self._silent_timeouts = 0
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _INCOMPLETE:
                self._deliver(answer)
        except (hiredis.ProtocolError, IndexError) as error:  # IndexError: a reply that nobody asked for
            self.drop(f"the store does not speak RESP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        why = str(exc) if exc is not None else self._why
        self.closed.set_result(why)
        for future, timer, _, _ in self.waiting:
            timer.cancel()
            if not future.done():
                future.set_exception(Unavailable(f"the connection to the store at {self._address} was lost: {why}"))
        self.waiting.clear()

    def _deliver(self, answer: Reply) -> None:
        future, timer, wanted, replies = self.waiting[0]
        if isinstance(answer, hiredis.ReplyError):
            answer = _error(self._address, answer)
        if replies is not None:
            replies.append(answer)
            if len(replies) < wanted:
                return
            answer = replies
        self.waiting.popleft()
        timer.cancel()
        if future.done():  # timed out or cancelled: its answer comes too late, but in its own place
            return
        if isinstance(answer, CallError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _expire(self, reply: asyncio.Future[Reply], timeout_s: float) -> None:
        if reply.done():
            return
        reply.set_exception(
            DeadlineExceeded(f"the store at {self._address} did not answer within {timeout_s * 1e3:.0f} ms")
        )
        self._silent_timeouts += 1
        if self._silent_timeouts >= MAX_SILENT_TIMEOUTS:
            self.drop(f"{self._silent_timeouts} commands in a row timed out")
