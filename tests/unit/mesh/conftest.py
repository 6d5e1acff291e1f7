"""A peer on the other end of a connection, by hand: frames in, frames out, no socket."""

from __future__ import annotations

import asyncio
import struct

import pytest

from services.mesh import h2frames as h2
from services.mesh.h2connection import Connection
from services.mesh.h2exchange import Exchange
from services.mesh.h2headers import RequestHeaders, ResponseReader, literal

MOST_BYTES = 100_000


class Wire(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.written += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True


class Peer:
    """A server as a script, and the owner of the connection to it."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.wire = Wire()
        self.connection = Connection(self, ResponseReader(), most_bytes)
        self.rooms = 0
        self.left = 0
        self.given_back: list[Exchange] = []
        self.lost = False
        self.connection.connection_made(self.wire)
        self._headers = RequestHeaders("localhost")

    def on_room(self, connection: Connection) -> None:
        self.rooms += 1

    def on_leaving(self, connection: Connection) -> None:
        self.left += 1

    def on_given_back(self, exchanges: list[Exchange]) -> None:
        self.given_back += exchanges

    def on_lost(self, connection: Connection) -> None:
        self.lost = True

    def call(self, request: bytes = b"ask", method: str = "/p.S/M") -> asyncio.Future[bytes]:
        return self.exchange(request, method)[1]

    def exchange(self, request: bytes = b"ask", method: str = "/p.S/M") -> tuple[Exchange, asyncio.Future[bytes]]:
        """A call that has been sent, and its answer."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        exchange = Exchange(method, self._headers.block(method, ()), request, float("inf"), answer)
        assert self.connection.has_room()
        self.connection.send(exchange, 1.0)
        return exchange, answer

    def feed(self, *frames: bytes, piece: int | None = None) -> None:
        """The connection reads these, in pieces of that many bytes."""
        data = b"".join(frames)
        while data:
            buffer = self.connection.get_buffer(-1)
            size = min(len(buffer), len(data), piece or len(data))
            buffer[:size] = data[:size]
            data = data[size:]
            self.connection.buffer_updated(size)

    def greet(self, **values: int) -> None:
        self.feed(h2.settings({h2.Setting[name]: value for name, value in values.items()}))

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """Frames written since the last look: (type, flags, stream, payload)."""
        data = bytes(self.wire.written).removeprefix(h2.PREFACE)
        self.wire.written.clear()
        frames = []
        while data:
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", data)
            size = high << 16 | low
            frames.append((kind, flags, stream, data[9 : 9 + size]))
            data = data[9 + size :]
        return frames

    @staticmethod
    def fields(stream: int, *fields: tuple[str, str], end: bool = False, flags: int = h2.END_HEADERS) -> bytes:
        block = b"".join(literal(name.encode(), value.encode()) for name, value in fields)
        return h2.frame(h2.HEADERS, flags | (h2.END_STREAM if end else 0), stream, block)

    @classmethod
    def head(cls, stream: int) -> bytes:
        return cls.fields(stream, (":status", "200"), ("content-type", "application/grpc"))

    @classmethod
    def status(cls, stream: int, code: int = 0, *more: tuple[str, str]) -> bytes:
        return cls.fields(stream, ("grpc-status", str(code)), *more, end=True)

    @staticmethod
    def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
        return h2.frame(h2.DATA, flags, stream, payload)

    @classmethod
    def message(cls, stream: int, message: bytes) -> bytes:
        return cls.data(stream, b"\x00" + len(message).to_bytes(4, "big") + message)

    @classmethod
    def answer(cls, stream: int, message: bytes) -> list[bytes]:
        """The frames of an answer."""
        return [cls.head(stream), cls.message(stream, message), cls.status(stream)]


@pytest.fixture
async def peer() -> Peer:
    """A peer that has sent its settings; what was written so far has been looked at."""
    peer = Peer()
    peer.greet()
    peer.sent()
    return peer


@pytest.fixture(scope="session")
def new_peer() -> type[Peer]:
    return Peer
