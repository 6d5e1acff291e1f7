"""One HTTP/2 connection to one trusted peer, in the event loop's own thread.

It sends unary calls and reads their answers. What breaks the protocol breaks the connection: every call on it ends,
and none gets an answer that was not its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

import grpc

from services.mesh import h2frames as h2
from services.mesh.h2exchange import Exchange, Malformed
from services.mesh.h2frames import ErrorCode, Setting, Violation
from services.mesh.h2headers import (
    MAX_HEADER_LIST_BYTES,
    ResponseReader,
    status_of_http,
    status_of_reset,
    timeout_field,
)

READ_BYTES = 2**16  # more than the largest frame that we accept
MAX_STREAMS = 4096  # where the peer allows more
RECEIVE_WINDOW = 2**26  # of the connection; what has been read is granted anew when half is used up
WRITE_BUFFER_BYTES = 2**18  # beyond, new calls wait
MOST_FRAME_BYTES = 2**16  # where the peer takes larger ones, so that no call holds up the others for long
MOST_UNREAD_REPLIES = 1000
_MESSAGE_PREFIX_BYTES = 5


class Owner(Protocol):
    """Who makes the calls. Never called from within `send`."""

    def on_room(self, connection: Connection) -> None:
        """A call can be sent again after `has_room` was false."""
        ...

    def on_leaving(self, connection: Connection) -> None:
        """No new call can be sent any more."""
        ...

    def on_given_back(self, exchanges: list[Exchange]) -> None:
        """The peer has promised that it did not act on these; they are no longer of this connection."""
        ...

    def on_lost(self, connection: Connection) -> None:
        """Closed; every call has been settled."""
        ...


class Connection(asyncio.BufferedProtocol):
    """settled: why the connection failed before the peer had sent its settings; None where it did not fail."""

    def __init__(self, owner: Owner, reader: ResponseReader, max_message_bytes: int) -> None:
        self._owner, self._reader, self._max_message = owner, reader, max_message_bytes
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self.settled: asyncio.Future[str | None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport
        self._exchanges: dict[int, Exchange] = {}
        self._next_stream = 1
        self.connected = False
        self.leaving = False  # takes no new calls
        self._writable = True
        self._unread_replies = 0  # written while the peer did not read
        # reading
        self._greeted = False  # the peer has sent its settings
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._filled = 0
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags, header block that goes on
        self._ungranted = 0
        # sending
        self._max_streams = 0  # until the peer has sent its settings
        self._max_frame = h2.DEFAULT_MAX_FRAME
        self._initial_window = h2.DEFAULT_WINDOW
        self._window = h2.DEFAULT_WINDOW
        self._held: deque[Exchange] = deque()  # with `unsent` bytes

    def __len__(self) -> int:
        """Calls under way."""
        return len(self._exchanges)

    def has_room(self) -> bool:
        return len(self._exchanges) < self._max_streams and self._writable and not self.leaving

    def send(self, exchange: Exchange, timeout_s: float) -> None:
        """Only with room. timeout_s: what is left until the exchange's deadline; above 0."""
        stream = self._next_stream
        self._next_stream = stream + 2
        self._exchanges[stream] = exchange
        exchange.stream, exchange.carrier = stream, self
        head, timeout, request = exchange.head, timeout_field(timeout_s), exchange.request
        size = len(request) + _MESSAGE_PREFIX_BYTES
        block = len(head) + len(timeout)
        headers = h2.FRAME_HEAD.pack(0, block, h2.HEADERS, h2.END_HEADERS, stream)
        if size <= self._window and size <= self._initial_window and size <= self._max_frame:
            self._window -= size
            start = h2.FRAME_AND_MESSAGE_HEAD.pack(
                size >> 16, size & 0xFFFF, h2.DATA, h2.END_STREAM, stream, 0, size - _MESSAGE_PREFIX_BYTES
            )
            self._transport.write(b"".join((headers, head, timeout, start, request)))
        else:
            self._transport.write(headers + head + timeout)
            exchange.window = self._initial_window
            exchange.unsent = memoryview(b"\x00" + len(request).to_bytes(4, "big") + request)
            self._held.append(exchange)
            self._send_held()
        if stream + 2 > h2.LAST_STREAM:
            self._leave()

    def abandon(self, exchange: Exchange) -> None:
        if self._exchanges.get(exchange.stream) is exchange:
            self._reset(exchange, ErrorCode.CANCEL)

    def close(self, detail: str) -> None:
        """Ends every call. `closed` is done soon after."""
        self.leaving = True
        self._transport.write(h2.goaway(ErrorCode.NO_ERROR))
        self._end_all(detail)
        self._transport.abort()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.connected = cast(asyncio.Transport, transport), True
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        mine = {
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: self._max_message + h2.DEFAULT_WINDOW,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES,
        }
        grant = h2.window_update(0, RECEIVE_WINDOW - h2.DEFAULT_WINDOW)
        self._transport.write(h2.PREFACE + h2.settings(mine) + grant)

    def connection_lost(self, error: Exception | None) -> None:
        self.leaving = True
        detail = f"connection lost: {error or 'closed by the peer'}"
        self._settle(detail)
        self._end_all(detail)
        self.closed.set_result(None)
        self._owner.on_lost(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._send_held()
        if self.has_room():
            self._owner.on_room(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._transport.is_closing():
            return
        self._filled += count
        try:
            self._read_frames()
        except Violation as violation:
            self._break_off(violation)

    # --- reading

    def _read_frames(self) -> None:
        buffer, start, filled = self._buffer, 0, self._filled
        while filled - start >= h2.HEAD_BYTES:
            high, low, kind, flags, stream = h2.FRAME_HEAD.unpack_from(buffer, start)
            size = high << 16 | low
            if size > h2.DEFAULT_MAX_FRAME:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes, must be at most 16384")
            end = start + h2.HEAD_BYTES + size
            if end > filled:
                break
            self._on_frame(kind, flags, stream & h2.LAST_STREAM, bytes(buffer[start + h2.HEAD_BYTES : end]))
            start = end
        if start:
            buffer[: filled - start] = buffer[start:filled]
            self._filled = filled - start

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != h2.CONTINUATION:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} within a header block")
        if not self._greeted and (kind != h2.SETTINGS or flags & h2.ACK):
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"the first frame is of type {kind}, must be SETTINGS")
        match kind:
            case h2.DATA:
                self._on_data(flags, stream, payload)
            case h2.HEADERS:
                self._on_headers(flags, stream, payload)
            case h2.CONTINUATION:
                self._on_continuation(flags, stream, payload)
            case h2.WINDOW_UPDATE:
                self._on_window_update(stream, payload)
            case h2.SETTINGS:
                self._on_settings(flags, stream, payload)
            case h2.PING:
                self._on_ping(flags, stream, payload)
            case h2.RST_STREAM:
                self._on_reset(stream, payload)
            case h2.GOAWAY:
                self._on_goaway(stream, payload)
            case h2.PRIORITY:
                _expect_size("PRIORITY", payload, 5)
            case h2.PUSH_PROMISE:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, and push is off")
            # other types are extensions, to be ignored

    def _exchange(self, stream: int) -> Exchange | None:
        """None for a stream that we have ended already. Raises Violation for one that we never began."""
        exchange = self._exchanges.get(stream)
        if exchange is None and (stream >= self._next_stream or stream % 2 == 0):
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {stream}, which was never opened")
        return exchange

    def _on_data(self, flags: int, stream: int, payload: bytes) -> None:
        self._ungranted += len(payload)
        if self._ungranted > RECEIVE_WINDOW // 2:
            self._transport.write(h2.window_update(0, self._ungranted))
            self._ungranted = 0
        data = h2.without_padding(flags, payload) if flags & h2.PADDED else payload
        exchange = self._exchange(stream)
        if exchange is None:
            return
        if exchange.headers is None:
            self._fail(exchange, grpc.StatusCode.INTERNAL, "DATA before HEADERS")
            return
        try:
            exchange.take(data, self._max_message)
        except Malformed as malformed:
            self._fail(exchange, malformed.code, str(malformed))
            return
        if flags & h2.END_STREAM:
            self._forget(exchange)
            exchange.fail(grpc.StatusCode.UNKNOWN, "the answer ended without a gRPC status")

    def _on_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & (h2.PADDED | h2.WITH_PRIORITY):
            payload = h2.without_padding(flags, payload)
            if flags & h2.WITH_PRIORITY:
                if len(payload) < 5:
                    raise Violation(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
                payload = payload[5:]
        if flags & h2.END_HEADERS:
            self._on_block(flags, stream, payload)
        else:
            self._exchange(stream)
            self._block = stream, flags, bytearray(payload)

    def _on_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream:
            raise Violation(
                ErrorCode.PROTOCOL_ERROR, f"CONTINUATION on stream {stream}, which has no open header block"
            )
        _, first_flags, block = self._block
        block += payload
        # an empty one makes no progress, and a peer could send them for ever
        if len(block) > MAX_HEADER_LIST_BYTES or not payload:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, f"a header block of {len(block)} bytes and no end")
        if flags & h2.END_HEADERS:
            self._block = None
            self._on_block(first_flags, stream, bytes(block))

    def _on_block(self, flags: int, stream: int, block: bytes) -> None:
        headers = self._reader.read(block)
        exchange = self._exchange(stream)
        if exchange is None:
            return
        if flags & h2.END_STREAM:
            self._forget(exchange)
            exchange.end(headers)
        elif exchange.headers is not None:
            self._fail(exchange, grpc.StatusCode.INTERNAL, "trailers that do not end the stream")
        elif headers.starts_an_answer:
            exchange.headers = headers
        elif not 100 <= headers.http_status < 200:  # those are only on the way to an answer
            what = f"HTTP status {headers.http_status} with content-type {headers.content_type!r}"
            self._fail(exchange, status_of_http(headers.http_status), what)

    def _on_window_update(self, stream: int, payload: bytes) -> None:
        _expect_size("WINDOW_UPDATE", payload, 4)
        increment = h2.UINT32.unpack(payload)[0] & h2.MAX_WINDOW
        if stream == 0:
            self._window += increment
            if not increment or self._window > h2.MAX_WINDOW:
                raise Violation(ErrorCode.FLOW_CONTROL_ERROR, f"WINDOW_UPDATE by {increment} to {self._window}")
        else:
            exchange = self._exchange(stream)
            if exchange is None:
                return
            exchange.window += increment
            if not increment or exchange.window > h2.MAX_WINDOW:
                self._fail(exchange, grpc.StatusCode.INTERNAL, f"WINDOW_UPDATE by {increment}")
        self._send_held()

    def _on_settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"SETTINGS on stream {stream}, must be 0")
        if flags & h2.ACK:
            _expect_size("SETTINGS with ACK", payload, 0)
            return
        if not self._greeted:
            self._greeted, self._max_streams = True, MAX_STREAMS
        for key, value in h2.read_settings(payload):
            if key == Setting.MAX_CONCURRENT_STREAMS:
                self._max_streams = min(value, MAX_STREAMS)
            elif key == Setting.MAX_FRAME_SIZE:
                self._max_frame = min(value, MOST_FRAME_BYTES)
            elif key == Setting.INITIAL_WINDOW_SIZE:
                self._change_windows(value)
        self._reply(h2.frame(h2.SETTINGS, h2.ACK, 0, b""))
        self._settle(None)
        self._send_held()
        if self.has_room():
            self._owner.on_room(self)

    def _settle(self, failure: str | None) -> None:
        if not self.settled.done():
            self.settled.set_result(failure)

    def _change_windows(self, initial: int) -> None:
        for exchange in self._held:
            exchange.window += initial - self._initial_window
            if exchange.window > h2.MAX_WINDOW:
                raise Violation(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {initial} overflows a window")
        self._initial_window = initial

    def _on_ping(self, flags: int, stream: int, payload: bytes) -> None:
        _expect_size("PING", payload, 8)
        if stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"PING on stream {stream}, must be 0")
        if not flags & h2.ACK:
            self._reply(h2.frame(h2.PING, h2.ACK, 0, payload))

    def _on_reset(self, stream: int, payload: bytes) -> None:
        _expect_size("RST_STREAM", payload, 4)
        exchange = self._exchange(stream)
        if exchange is None:
            return
        code = h2.UINT32.unpack(payload)[0]
        exchange.unsent = None
        self._forget(exchange)
        if code == ErrorCode.REFUSED_STREAM:
            self._owner.on_given_back([exchange])
        else:
            exchange.fail(status_of_reset(code), f"stream reset by the peer: {ErrorCode.named(code)}")

    def _on_goaway(self, stream: int, payload: bytes) -> None:
        if stream or len(payload) < 8:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"GOAWAY of {len(payload)} bytes on stream {stream}")
        last = h2.UINT32.unpack_from(payload)[0] & h2.LAST_STREAM
        unprocessed = [exchange for number, exchange in self._exchanges.items() if number > last]
        for exchange in unprocessed:
            del self._exchanges[exchange.stream]
        self._held = deque(exchange for exchange in self._held if exchange not in unprocessed)
        self._leave()
        self._owner.on_given_back(unprocessed)

    def _reply(self, frame: bytes) -> None:
        self._unread_replies = 0 if self._writable else self._unread_replies + 1
        if self._unread_replies > MOST_UNREAD_REPLIES:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "the peer asks for replies and does not read them")
        self._transport.write(frame)

    # --- sending what flow control held back

    def _send_held(self) -> None:
        """As much as the windows allow, one frame of each call in turn."""
        stuck = 0
        while self._held and self._window > 0 and self._writable and stuck < len(self._held):
            exchange = self._held.popleft()
            if exchange.unsent is None:  # ended meanwhile
                continue
            piece = exchange.unsent[: max(0, min(exchange.window, self._window, self._max_frame))]
            if piece:
                self._send_piece(exchange, piece, len(piece) == len(exchange.unsent))
                stuck = 0
            else:
                stuck += 1
            if exchange.unsent is not None:
                self._held.append(exchange)

    def _send_piece(self, exchange: Exchange, piece: memoryview, last: bool) -> None:
        assert exchange.unsent is not None
        flags = h2.END_STREAM if last else 0
        self._transport.write(h2.frame(h2.DATA, flags, exchange.stream, bytes(piece)))
        self._window -= len(piece)
        exchange.window -= len(piece)
        exchange.unsent = None if last else exchange.unsent[len(piece) :]

    # --- the end of calls, and of the connection

    def _forget(self, exchange: Exchange) -> None:
        """The stream has ended on the peer's side."""
        if exchange.unsent is not None:  # answered before all was sent, as the protocol allows
            self._reset(exchange, ErrorCode.NO_ERROR)
            return
        was_full = not self.has_room()
        del self._exchanges[exchange.stream]
        self._after_end(was_full)

    def _reset(self, exchange: Exchange, code: ErrorCode) -> None:
        was_full = not self.has_room()
        del self._exchanges[exchange.stream]
        if not self._transport.is_closing():
            self._transport.write(h2.reset(exchange.stream, code))
        exchange.unsent = None
        self._after_end(was_full)

    def _fail(self, exchange: Exchange, code: grpc.StatusCode, message: str) -> None:
        self._reset(exchange, ErrorCode.CANCEL)
        exchange.fail(code, message)

    def _after_end(self, was_full: bool) -> None:
        if self.leaving and not self._exchanges:
            self._transport.close()
        elif was_full and self.has_room():
            self._owner.on_room(self)

    def _leave(self) -> None:
        self.leaving = True
        self._owner.on_leaving(self)
        if not self._exchanges:
            self._transport.close()

    def _break_off(self, violation: Violation) -> None:
        detail = f"the peer broke the protocol: {violation}"
        self.leaving = True
        self._transport.write(h2.goaway(violation.code, str(violation)))
        self._transport.abort()
        self._settle(detail)
        self._end_all(detail)
        self._owner.on_leaving(self)

    def _end_all(self, detail: str) -> None:
        exchanges, self._exchanges = self._exchanges, {}
        self._held.clear()
        for exchange in exchanges.values():
            exchange.fail(grpc.StatusCode.UNAVAILABLE, detail)


def _expect_size(name: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, f"{name} of {len(payload)} bytes, must be {size}")
