from __future__ import annotations

import grpc
import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from services.mesh.h2frames import ErrorCode, Violation
from services.mesh.h2headers import (
    RequestHeaders,
    ResponseReader,
    literal,
    status_of_http,
    status_of_reset,
    timeout_field,
)
from services.resilience.errors import BadInput

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=400).map(str.strip)
KEYS = st.from_regex(r"x-[a-z0-9_.-]{0,150}", fullmatch=True).filter(lambda key: not key.endswith("-bin"))


def decoded(block: bytes) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in Decoder().decode(block)]


def test_a_request_says_what_grpc_demands_and_carries_its_metadata() -> None:
    headers = RequestHeaders("localhost")
    block = headers.block("/p.S/M", (("x-priority", "critical"),)) + timeout_field(0.25)
    assert decoded(block) == [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/p.S/M"),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("x-priority", "critical"),
        ("grpc-timeout", "250000u"),
    ]


@given(st.lists(st.tuples(KEYS, PRINTABLE), max_size=8))
def test_any_printable_metadata_arrives_as_it_was_also_when_sent_again(pairs: list[tuple[str, str]]) -> None:
    headers = RequestHeaders("localhost")
    for _ in range(2):
        assert decoded(headers.block("/p.S/M", tuple(pairs)))[6:] == pairs


@pytest.mark.parametrize(
    "pair",
    [
        ("x-tenant", "a\nb"),
        ("x-tenant", "a\x00"),
        ("x-tenant", "käse"),
        ("x-tenant", " padded"),
        ("X-Tenant", "a"),
        ("x tenant", "a"),
        ("", "a"),
        (":path", "/other"),
        ("te", "gzip"),
        ("grpc-timeout", "1S"),
        ("x-blob-bin", "a"),
    ],
)
def test_metadata_that_cannot_travel_is_refused_by_name(pair: tuple[str, str]) -> None:
    headers = RequestHeaders("localhost")
    with pytest.raises(BadInput, match="metadata"):
        headers.block("/p.S/M", (pair,))
    assert decoded(headers.block("/p.S/M", (("x-tenant", "a"),)))[6:] == [("x-tenant", "a")]


def test_metadata_that_does_not_fit_in_one_frame_is_refused_with_its_size() -> None:
    with pytest.raises(BadInput, match=r"metadata: 2\d{4} bytes, must be at most 16320"):
        RequestHeaders("localhost").block("/p.S/M", (("x-a", "a" * 20_000),))


@pytest.mark.parametrize(
    ("timeout_s", "text"),
    [
        (1e-9, "1u"),
        (0.0015, "1500u"),
        (98.5, "98500000u"),
        (99.5, "99500m"),
        (86_400.0, "86400000m"),
        (1e12, "86400000m"),
        (float("inf"), "86400000m"),
    ],
)
def test_a_timeout_has_at_most_eight_digits(timeout_s: float, text: str) -> None:
    assert decoded(timeout_field(timeout_s)) == [("grpc-timeout", text)]


@pytest.mark.parametrize("huffman", [False, True])
def test_a_response_is_read_however_its_strings_are_coded(huffman: bool) -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    fields = [
        (":status", "200"),
        ("content-type", "application/grpc+proto"),
        ("grpc-status", "8"),
        ("grpc-message", "kein Platz f%C3%BCr %d"),
        ("x-shed-reason", "queue_full"),
    ]
    headers = ResponseReader().read(encoder.encode(fields, huffman=huffman))
    assert headers.starts_an_answer
    assert (headers.http_status, headers.grpc_status) == (200, 8)
    assert headers.message == "kein Platz für %d"
    assert headers.metadata == (("x-shed-reason", "queue_full"),)


def test_equal_bytes_are_decoded_once_and_the_memory_stays_bounded() -> None:
    reader = ResponseReader()
    block = literal(b"grpc-status", b"0")
    assert reader.read(block) is reader.read(block)
    for number in range(5000):
        reader.read(literal(b"date", b"%d" % number))
    assert len(reader._seen) <= 1024


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (b"\xff\xff\xff\xff\xff\xff", ErrorCode.COMPRESSION_ERROR),  # an index without end
        (b"\xbe", ErrorCode.COMPRESSION_ERROR),  # the first entry of a table that holds nothing
        (b"\x3f\xe1\x1f", ErrorCode.COMPRESSION_ERROR),  # a table of 4096 bytes, where 0 are allowed
        (b"\x00\x05ab", ErrorCode.COMPRESSION_ERROR),  # shorter than it says
        (b"\x00\x81\x00\x01a", ErrorCode.COMPRESSION_ERROR),  # not Huffman code
        (literal(b"x", b"y" * 70_000), ErrorCode.COMPRESSION_ERROR),
        (literal(b":status", b"ok"), ErrorCode.PROTOCOL_ERROR),
        (literal(b":status", b"999"), ErrorCode.PROTOCOL_ERROR),
        (literal(b":path", b"/"), ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_what_is_not_the_header_of_a_response_breaks_the_protocol(block: bytes, code: ErrorCode) -> None:
    with pytest.raises(Violation) as raised:
        ResponseReader().read(block)
    assert raised.value.code is code


@given(st.binary(max_size=300))
def test_any_bytes_are_headers_or_a_violation(block: bytes) -> None:
    try:
        headers = ResponseReader().read(block)
    except Violation:
        return
    assert headers.http_status == 0 or 100 <= headers.http_status <= 599


def test_a_status_that_is_no_number_counts_as_unknown() -> None:
    assert ResponseReader().read(literal(b"grpc-status", b"seven")).grpc_status == grpc.StatusCode.UNKNOWN.value[0]


@pytest.mark.parametrize(
    ("http_status", "code"),
    [
        (400, grpc.StatusCode.INTERNAL),
        (401, grpc.StatusCode.UNAUTHENTICATED),
        (403, grpc.StatusCode.PERMISSION_DENIED),
        (404, grpc.StatusCode.UNIMPLEMENTED),
        (429, grpc.StatusCode.UNAVAILABLE),
        (503, grpc.StatusCode.UNAVAILABLE),
        (200, grpc.StatusCode.UNKNOWN),
        (500, grpc.StatusCode.UNKNOWN),
    ],
)
def test_http_status_maps_as_grpc_says(http_status: int, code: grpc.StatusCode) -> None:
    assert status_of_http(http_status) is code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ErrorCode.REFUSED_STREAM, grpc.StatusCode.UNAVAILABLE),
        (ErrorCode.CANCEL, grpc.StatusCode.CANCELLED),
        (ErrorCode.ENHANCE_YOUR_CALM, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCode.PROTOCOL_ERROR, grpc.StatusCode.INTERNAL),
        (4711, grpc.StatusCode.INTERNAL),
    ],
)
def test_a_reset_maps_as_grpc_says(error: int, code: grpc.StatusCode) -> None:
    assert status_of_reset(error) is code
