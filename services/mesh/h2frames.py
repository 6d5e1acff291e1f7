"""HTTP/2 frames (RFC 9113), as far as a client of unary calls needs them."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
DEFAULT_WINDOW = 65_535
DEFAULT_MAX_FRAME = 16_384
MAX_WINDOW = 2**31 - 1
LAST_STREAM = 2**31 - 1

# frame types
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

# flags
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20


class Setting(enum.IntEnum):
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(enum.IntEnum):
    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13

    @classmethod
    def named(cls, code: int) -> str:
        return cls(code).name if code in _CODES else f"error {code}"


_CODES = frozenset(ErrorCode)


class Violation(Exception):
    """The peer broke the protocol: the connection cannot go on."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


# length (24 bits, as 8 and 16), type, flags, stream; and the same followed by gRPC's compressed flag and length
FRAME_HEAD = struct.Struct(">BHBBI")
FRAME_AND_MESSAGE_HEAD = struct.Struct(">BHBBIBI")
UINT32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """payload: shorter than 2**24 bytes."""
    size = len(payload)
    return FRAME_HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def reset(stream: int, code: ErrorCode) -> bytes:
    return frame(RST_STREAM, 0, stream, UINT32.pack(code))


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, UINT32.pack(increment))


def goaway(code: ErrorCode, detail: str = "") -> bytes:
    # the last stream of the peer's that we acted on: none, for a server may open no streams here
    return frame(GOAWAY, 0, 0, UINT32.pack(0) + UINT32.pack(code) + detail.encode()[:256])


def settings(values: dict[Setting, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """(identifier, value) of a server's SETTINGS, checked; unknown ones are passed on for the caller to ignore."""
    if len(payload) % _SETTING.size:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes, not a multiple of 6")
    for key, value in _SETTING.iter_unpack(payload):
        if key == Setting.ENABLE_PUSH and value != 0:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"a server set ENABLE_PUSH to {value}, must be 0")
        if key == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value}, must be at most {MAX_WINDOW}")
        if key == Setting.MAX_FRAME_SIZE and not DEFAULT_MAX_FRAME <= value < 2**24:
            raise Violation(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}, must be 16384 to 16777215")
        yield key, value


def without_padding(flags: int, payload: bytes) -> bytes:
    """What a DATA or HEADERS frame carries, less its padding."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Violation(ErrorCode.PROTOCOL_ERROR, f"padding as long as its frame of {len(payload)} bytes")
    return payload[1 : len(payload) - payload[0]]
