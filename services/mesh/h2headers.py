"""Headers of gRPC over HTTP/2: requests written, responses read.

Neither side keeps HPACK state: we write literals only, and tell the peer that our table holds nothing. So equal bytes
mean equal headers, on every connection, and both directions can be remembered.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, TypeVar
from urllib.parse import unquote

import grpc
from hpack import Decoder
from hpack.exceptions import HPACKError

from services.mesh.context import Metadata
from services.mesh.h2frames import DEFAULT_MAX_FRAME, ErrorCode, Violation
from services.resilience.errors import BadInput
from services.resilience.errors import Violation as Wrong

K = TypeVar("K")
V = TypeVar("V")

MAX_HEADER_BYTES = DEFAULT_MAX_FRAME  # of a request: one HEADERS frame, so that CONTINUATION is never sent
MAX_HEADER_LIST_BYTES = 2**16  # of a response, decoded
_REMEMBERED = 1024  # entries of each memory; a full one starts over
_REMEMBERED_VALUE_CHARS = 32  # longer values (trace contexts) differ from call to call

_METHOD_POST, _SCHEME_HTTP = b"\x83", b"\x86"
_PATH, _AUTHORITY, _CONTENT_TYPE = b"\x04", b"\x01", b"\x0f\x10"  # literal, never added to a table; name by index

_KEY = re.compile("[0-9a-z_.-]+")
_RESERVED = frozenset({"te", "content-type", "connection", "host", "transfer-encoding", "upgrade", "keep-alive"})
_LONGEST_TIMEOUT_S = 86_400.0
_MICROSECONDS_UNTIL_S = 99.0  # grpc-timeout has at most eight digits


def string(text: bytes) -> bytes:
    """HPACK string literal, not Huffman-coded: on one machine, bytes cost less than the coding."""
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    head = bytearray((127,))
    size -= 127
    while size >= 128:
        head.append(size % 128 + 128)
        size //= 128
    head.append(size)
    return bytes(head) + text


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that no table remembers."""
    return b"\x00" + string(name) + string(value)


_TIMEOUT = tuple(b"\x00" + string(b"grpc-timeout") + bytes((size,)) for size in range(10))


class RequestHeaders:
    """Writes the header block of calls to one authority."""

    def __init__(self, authority: str) -> None:
        self._authority = _AUTHORITY + string(authority.encode("ascii"))
        self._methods: dict[str, bytes] = {}
        self._pairs: dict[tuple[str, str], bytes] = {}
        self._names: dict[str, bytes] = {}

    def block(self, method: str, metadata: Metadata) -> bytes:
        """All but the timeout. Raises BadInput for metadata that cannot travel."""
        pairs = self._pairs
        parts = [pairs.get(pair) or self._pair(pair) for pair in metadata]
        block = (self._methods.get(method) or self._method(method)) + b"".join(parts)
        if len(block) > MAX_HEADER_BYTES - 64:  # the rest is for the timeout
            raise BadInput(Wrong("metadata", f"{len(block)} bytes, must be at most {MAX_HEADER_BYTES - 64}"))
        return block

    def _method(self, method: str) -> bytes:
        block = b"".join(
            (
                _METHOD_POST + _SCHEME_HTTP + _PATH + string(method.encode("ascii")),
                self._authority,
                literal(b"te", b"trailers"),
                _CONTENT_TYPE + string(b"application/grpc"),
            )
        )
        return _remember(self._methods, method, block)

    def _pair(self, pair: tuple[str, str]) -> bytes:
        key, value = pair
        name = self._names.get(key) or self._name(key)
        if not (value.isascii() and (value.isprintable() or not value)) or value != value.strip():
            raise BadInput(Wrong(f"metadata.{key}", f"must be printable ASCII without outer spaces, got {value!r}"))
        encoded = name + string(value.encode("ascii"))
        return _remember(self._pairs, pair, encoded) if len(value) <= _REMEMBERED_VALUE_CHARS else encoded

    def _name(self, key: str) -> bytes:
        if not _KEY.fullmatch(key) or key.startswith("grpc-") or key.endswith("-bin") or key in _RESERVED:
            allowed = "a name must be of [0-9a-z_.-], neither HTTP's nor gRPC's own, and not end in -bin"
            raise BadInput(Wrong("metadata", f"{allowed}, got {key!r}"))
        return _remember(self._names, key, b"\x00" + string(key.encode("ascii")))


def timeout_field(timeout_s: float) -> bytes:
    """The header field grpc-timeout. timeout_s: above 0; more than a day is sent as a day."""
    if timeout_s < _MICROSECONDS_UNTIL_S:
        value = b"%du" % max(1, timeout_s * 1e6)
    else:
        value = b"%dm" % (min(timeout_s, _LONGEST_TIMEOUT_S) * 1e3)
    return _TIMEOUT[len(value)] + value


class ResponseHeaders(NamedTuple):
    """What matters of a header or trailer block.

    http_status: 0 where there is none, as in trailers. grpc_status: None where there is none.
    message: of the status, decoded. metadata: every field that is neither HTTP's nor gRPC's own.
    """

    http_status: int = 0
    grpc_status: int | None = None
    message: str = ""
    content_type: str = ""
    metadata: Metadata = ()

    @property
    def starts_an_answer(self) -> bool:
        return self.http_status == 200 and self.content_type.startswith("application/grpc")


class ResponseReader:
    """Decodes header blocks, and remembers them: a proxy repeats itself."""

    def __init__(self) -> None:
        self._seen: dict[bytes, ResponseHeaders] = {}

    def read(self, block: bytes) -> ResponseHeaders:
        """Raises Violation for what is not HPACK, or not headers of a response."""
        return self._seen.get(block) or _remember(self._seen, block, _decode(block))


def _decode(block: bytes) -> ResponseHeaders:
    decoder = Decoder(MAX_HEADER_LIST_BYTES)
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        fields = [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
    except HPACKError as error:
        raise Violation(ErrorCode.COMPRESSION_ERROR, f"headers: {error}") from None
    headers = ResponseHeaders()
    metadata: list[tuple[str, str]] = []
    for name, raw in fields:
        value = raw.decode("utf-8", "replace")
        match name:
            case b":status":
                headers = headers._replace(http_status=_http_status(raw))
            case b"grpc-status":
                headers = headers._replace(grpc_status=_grpc_status(raw))
            case b"grpc-message":
                headers = headers._replace(message=unquote(value, errors="replace"))
            case b"content-type":
                headers = headers._replace(content_type=value)
            case _ if name.startswith(b":"):
                raise Violation(ErrorCode.PROTOCOL_ERROR, f"a response has the pseudo-header {name[:32]!r}")
            case _:
                metadata.append((name.decode("utf-8", "replace"), value))
    return headers._replace(metadata=tuple(metadata))


def _http_status(value: bytes) -> int:
    if len(value) != 3 or not value.isdigit() or not 100 <= int(value) <= 599:
        raise Violation(ErrorCode.PROTOCOL_ERROR, f":status must be 100 to 599, got {value[:32]!r}")
    return int(value)


def _grpc_status(value: bytes) -> int:
    """A status that is no number says as much as an unknown one."""
    return int(value) if value.isdigit() and len(value) < 10 else _UNKNOWN


_UNKNOWN: Final[int] = grpc.StatusCode.UNKNOWN.value[0]

_OF_HTTP = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}


def status_of_http(http_status: int) -> grpc.StatusCode:
    """The status of an answer that has only an HTTP one, as gRPC's "HTTP to gRPC Status Code Mapping" has it."""
    return _OF_HTTP.get(http_status, grpc.StatusCode.UNKNOWN)


_OF_RESET = {
    ErrorCode.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
}


def status_of_reset(code: int) -> grpc.StatusCode:
    """The status of a stream that the peer reset, as "PROTOCOL-HTTP2" of gRPC maps error codes."""
    return next((status for error, status in _OF_RESET.items() if error == code), grpc.StatusCode.INTERNAL)


def _remember(memory: dict[K, V], key: K, value: V) -> V:
    if len(memory) >= _REMEMBERED:
        memory.clear()
    memory[key] = value
    return value
