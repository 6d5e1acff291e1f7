"""A Channel in the event loop's own thread, for unary calls to one trusted peer without TLS.

A call here costs a fraction of one over grpc.aio, whose every call is handed between threads. It is made for the
gateway's egress listener: one connection, no balancing, no retries but of calls that the peer has promised it did not
act on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque

import grpc

from services.mesh import attributes
from services.mesh.context import Metadata
from services.mesh.errors import CalleeError, callee_error
from services.mesh.h2connection import Connection
from services.mesh.h2deadlines import Deadlines
from services.mesh.h2exchange import Exchange
from services.mesh.h2headers import RequestHeaders, ResponseReader
from services.resilience.errors import Reason

log = logging.getLogger(__name__)

MAX_WAITING = 4096  # calls without room on a connection; more are refused
MOST_GIVEN_BACK = 3  # sent again as often: a server may count a stream for a moment longer than we do
CONNECT_TIMEOUT_S = 1.0  # until the peer's settings are here
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0
_UNIX = "unix:"


class H2Channel:
    """A Channel over HTTP/2. Belongs to one event loop; connects at the first call.

    A call made without a connection waits for the next attempt to connect, and fails UNAVAILABLE if that one fails.
    """

    def __init__(self, address: str, *, max_message_bytes: int, max_waiting: int = MAX_WAITING) -> None:
        """address: "host:port" or "unix:/path"."""
        self.address = address
        self._max_message, self._max_waiting = max_message_bytes, max_waiting
        self._headers = RequestHeaders("localhost" if address.startswith(_UNIX) else address)
        self._reader = ResponseReader()
        self._waiting: deque[Exchange] = deque()
        self._connection: Connection | None = None  # the one that takes new calls
        self._connections: set[Connection] = set()  # those too that only finish their calls
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._not_before = 0.0  # when to try to connect again, on the loop's clock
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        self._deadlines: Deadlines | None = None

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        if self._deadlines is None:
            self._loop = asyncio.get_running_loop()
            self._deadlines = Deadlines(self._loop, self._expire)
        head = self._headers.block(method, metadata)
        self._check(method, request, timeout_s)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        exchange = Exchange(method, head, request, self._loop.time() + timeout_s, answer)
        connection = self._connection
        if connection is not None and connection.has_room():
            connection.send(exchange, timeout_s)
        else:
            self._wait(exchange)
        self._deadlines.add(exchange)
        try:
            return await answer
        except asyncio.CancelledError:
            exchange.abandon()
            raise

    async def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        self._fail_waiting("the channel is closed")
        connections = list(self._connections)
        for connection in connections:
            connection.close("the channel is closed")
        if connections:
            await asyncio.wait([connection.closed for connection in connections])
        if self._deadlines is not None:
            self._deadlines.close()

    # --- the connection's side

    def on_room(self, connection: Connection) -> None:
        while self._waiting and connection.has_room():
            exchange = self._waiting.popleft()
            remaining_s = exchange.deadline - self._loop.time()
            if exchange.answer is not None and remaining_s > 0:  # otherwise the deadline's timer settles it
                connection.send(exchange, remaining_s)

    def on_leaving(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        self._connect_for_waiting()

    def on_given_back(self, exchanges: list[Exchange]) -> None:
        again: list[Exchange] = []
        for exchange in exchanges:
            exchange.given_back += 1
            if self._closed or exchange.given_back > MOST_GIVEN_BACK:
                exchange.fail(grpc.StatusCode.UNAVAILABLE, "refused by the peer before it looked at the call")
            else:
                exchange.reset()
                again.append(exchange)
        self._waiting.extendleft(reversed(again))
        if self._connection is not None:
            self.on_room(self._connection)
        self._connect_for_waiting()

    def on_lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._connection is connection:
            self._connection = None
            self._not_before = self._loop.time() + backoff_s(1)
        self._connect_for_waiting()

    # --- waiting

    def _check(self, method: str, request: bytes, timeout_s: float) -> None:
        if self._closed:
            raise callee_error(method, grpc.StatusCode.UNAVAILABLE, "the channel is closed", ())
        if not timeout_s > 0:
            raise _late(method)
        if len(request) > self._max_message:
            detail = f"a request of {len(request)} bytes, must be at most {self._max_message}"
            raise callee_error(method, grpc.StatusCode.RESOURCE_EXHAUSTED, detail, ())

    def _wait(self, exchange: Exchange) -> None:
        if len(self._waiting) >= self._max_waiting:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.answer is not None)
            if len(self._waiting) >= self._max_waiting:
                reason = ((attributes.SHED_REASON, Reason.QUEUE_FULL.label),)
                detail = f"{len(self._waiting)} calls wait for {self.address} already"
                raise callee_error(exchange.method, grpc.StatusCode.RESOURCE_EXHAUSTED, detail, reason)
        self._waiting.append(exchange)
        self._connect_for_waiting()

    def _expire(self, exchange: Exchange) -> None:
        answer = exchange.answer
        exchange.abandon()
        if answer is not None and not answer.done():
            answer.set_exception(_late(exchange.method))

    def _fail_waiting(self, detail: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for exchange in waiting:
            exchange.fail(grpc.StatusCode.UNAVAILABLE, detail)

    # --- connecting

    def _connect_for_waiting(self) -> None:
        if self._waiting and self._connection is None and self._connecting is None and not self._closed:
            self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await asyncio.sleep(self._not_before - self._loop.time())
            self._connection = await self._open()
        except OSError as error:
            reason = str(error) or f"no answer within {CONNECT_TIMEOUT_S:g} s"
            self._failures += 1
            self._not_before = self._loop.time() + backoff_s(self._failures)
            log.warning("cannot connect", extra={"address": self.address, "error": reason})
            self._fail_waiting(f"cannot connect to {self.address}: {reason}")
        else:
            self._failures = 0
            self.on_room(self._connection)
        finally:
            self._connecting = None

    async def _open(self) -> Connection:
        """A connection whose peer has sent its settings. Raises OSError."""
        connection = Connection(self, self._reader, self._max_message)
        self._connections.add(connection)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self.address.startswith(_UNIX):
                    path = self.address.removeprefix(_UNIX)
                    await self._loop.create_unix_connection(lambda: connection, path)
                else:
                    host, _, port = self.address.rpartition(":")
                    await self._loop.create_connection(lambda: connection, host.strip("[]"), int(port))
                failure = await connection.settled
        except BaseException:
            self._connections.discard(connection)
            if connection.connected:
                connection.close("given up")
            raise
        if failure is not None or connection.leaving:
            raise ConnectionError(failure or "the peer took the connection back at once")
        return connection


def backoff_s(failures: int) -> float:
    """How long to wait after that many failures in a row; random, so that clients do not come back in step."""
    return min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)


def _late(method: str) -> CalleeError:
    return callee_error(method, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer came", ())
