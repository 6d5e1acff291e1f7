from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc
import pytest

from services.mesh import h2frames as h2
from services.mesh.errors import CalleeError
from services.mesh.h2frames import ErrorCode, Setting
from services.resilience.errors import Reason

Peer = Any  # tests/unit/mesh/conftest.py


async def failed(answer: asyncio.Future[bytes]) -> CalleeError:
    """The error that the call ended with."""
    assert answer.done()
    with pytest.raises(CalleeError) as raised:
        await answer
    return raised.value


async def test_the_connection_opens_with_its_preface_and_settings_without_header_tables_or_push(
    new_peer: type[Peer],
) -> None:
    peer = new_peer()
    assert peer.wire.written.startswith(h2.PREFACE)
    (kind, _, stream, settings), update = peer.sent()
    values = dict(struct.iter_unpack(">HI", settings))
    assert (kind, stream) == (h2.SETTINGS, 0)
    assert values[Setting.HEADER_TABLE_SIZE] == values[Setting.ENABLE_PUSH] == 0
    assert values[Setting.INITIAL_WINDOW_SIZE] > 100_000
    assert update[0] == h2.WINDOW_UPDATE


async def test_nothing_is_sent_before_the_peers_settings_are_here(new_peer: type[Peer]) -> None:
    peer = new_peer()
    assert not peer.connection.has_room()
    peer.sent()
    peer.greet(MAX_CONCURRENT_STREAMS=1)
    assert peer.sent() == [(h2.SETTINGS, h2.ACK, 0, b"")]
    assert peer.connection.has_room()
    assert peer.connection.settled.result() is None
    assert peer.rooms == 1


async def test_a_call_leaves_as_one_write_of_headers_and_message(peer: Peer) -> None:
    peer.call(b"request")
    headers, data = peer.sent()
    assert headers[:3] == (h2.HEADERS, h2.END_HEADERS, 1)
    assert data == (h2.DATA, h2.END_STREAM, 1, b"\x00\x00\x00\x00\x07request")


async def test_answers_find_their_calls_in_whatever_order_and_pieces_they_come(peer: Peer) -> None:
    for piece in (1, 2, 7, 64, None):
        answers = [peer.call() for _ in range(3)]
        first = 1 + 2 * 3 * (1, 2, 7, 64, None).index(piece)
        frames = [
            peer.head(first + 4),
            *peer.answer(first, b"a" * 300),
            peer.message(first + 4, b"c"),
            *peer.answer(first + 2, b""),
            peer.status(first + 4),
        ]
        peer.feed(*frames, piece=piece)
        assert [await answer for answer in answers] == [b"a" * 300, b"", b"c"]


async def test_a_message_may_come_in_many_frames_even_within_its_prefix(peer: Peer) -> None:
    answer = peer.call()
    message = b"\x00\x00\x00\x00\x05hello"
    peer.feed(peer.head(1), peer.data(1, b""), *(peer.data(1, message[i : i + 1]) for i in range(len(message))))
    peer.feed(peer.status(1))
    assert await answer == b"hello"


async def test_padding_and_priority_are_taken_off(peer: Peer) -> None:
    answer = peer.call()
    head = peer.head(1)[h2.HEAD_BYTES :]
    padded = b"\x03" + b"\x00\x00\x00\x00\x10" + head + b"\x00" * 3
    peer.feed(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.PADDED | h2.WITH_PRIORITY, 1, padded))
    peer.feed(peer.data(1, b"\x04\x00\x00\x00\x00\x02ok" + b"\x00" * 4, h2.PADDED), peer.status(1))
    assert await answer == b"ok"


async def test_a_header_block_may_go_on_in_continuation_frames(peer: Peer) -> None:
    answer = peer.call()
    block = peer.status(1, 5, ("grpc-message", "not here"))[h2.HEAD_BYTES :]
    peer.feed(h2.frame(h2.HEADERS, h2.END_STREAM, 1, block[:4]), h2.frame(h2.CONTINUATION, 0, 1, block[4:9]))
    peer.feed(h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[9:]))
    error = await failed(answer)
    assert (error.code, error.message) == (grpc.StatusCode.NOT_FOUND, "not here")


async def test_a_status_comes_with_its_message_and_reason(peer: Peer) -> None:
    answer = peer.call()
    peer.feed(
        peer.head(1), peer.status(1, 8, ("grpc-message", "voll%2C f%C3%BCr jetzt"), ("x-shed-reason", "queue_full"))
    )
    error = await failed(answer)
    assert error.refused
    assert (error.message, error.reason) == ("voll, für jetzt", Reason.QUEUE_FULL)


async def test_an_answer_of_trailers_only_is_a_status(peer: Peer) -> None:
    answer = peer.call()
    peer.feed(peer.fields(1, (":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12"), end=True))
    assert (await failed(answer)).code is grpc.StatusCode.UNIMPLEMENTED


async def test_informational_headers_are_only_on_the_way(peer: Peer) -> None:
    answer = peer.call()
    peer.feed(peer.fields(1, (":status", "103")), *peer.answer(1, b"ok"))
    assert await answer == b"ok"


@pytest.mark.parametrize(
    ("frames", "code", "words"),
    [
        (lambda p: [p.head(1), p.status(1)], grpc.StatusCode.INTERNAL, "without a message"),
        (lambda p: [p.message(1, b"x")], grpc.StatusCode.INTERNAL, "DATA before HEADERS"),
        (
            lambda p: [p.head(1), p.message(1, b"x"), p.message(1, b"y"), p.status(1)],
            grpc.StatusCode.INTERNAL,
            "a second message",
        ),
        (
            lambda p: [p.head(1), p.data(1, b"\x00\x00\x00\x00\x01x" * 2), p.status(1)],
            grpc.StatusCode.INTERNAL,
            "a second message",
        ),
        (lambda p: [p.head(1), p.data(1, b"\x01\x00\x00\x00\x01x")], grpc.StatusCode.INTERNAL, "compressed flag 1"),
        (
            lambda p: [p.head(1), p.data(1, b"\x00\x00\x01\x86\xa1x")],
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "100001 bytes, must be at most 100000",
        ),
        (lambda p: [p.head(1), p.head(1)], grpc.StatusCode.INTERNAL, "do not end the stream"),
        (
            lambda p: [p.head(1), p.data(1, b"\x00\x00\x00\x00\x01x", h2.END_STREAM)],
            grpc.StatusCode.UNKNOWN,
            "without a gRPC status",
        ),
        (
            lambda p: [p.fields(1, (":status", "503"), ("content-type", "text/html"))],
            grpc.StatusCode.UNAVAILABLE,
            "HTTP status 503",
        ),
        (lambda p: [p.fields(1, (":status", "404"), end=True)], grpc.StatusCode.UNIMPLEMENTED, "HTTP status 404"),
        (
            lambda p: [p.fields(1, (":status", "200"), ("content-type", "text/html"))],
            grpc.StatusCode.UNKNOWN,
            "text/html",
        ),
        (lambda p: [h2.reset(1, ErrorCode.INTERNAL_ERROR)], grpc.StatusCode.INTERNAL, "INTERNAL_ERROR"),
        (lambda p: [h2.reset(1, 4711)], grpc.StatusCode.INTERNAL, "error 4711"),
        (lambda p: [h2.reset(1, ErrorCode.CANCEL)], grpc.StatusCode.CANCELLED, "CANCEL"),
        (lambda p: [h2.frame(h2.WINDOW_UPDATE, 0, 1, b"\0\0\0\0")], grpc.StatusCode.INTERNAL, "WINDOW_UPDATE by 0"),
    ],
)
async def test_a_malformed_answer_fails_its_own_call_and_no_other(
    peer: Peer, frames: Any, code: grpc.StatusCode, words: str
) -> None:
    bad, good = peer.call(), peer.call()
    peer.feed(*frames(peer))
    error = await failed(bad)
    assert error.code is code
    assert words in error.message
    peer.feed(*peer.answer(3, b"fine"))
    assert await good == b"fine"


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([h2.frame(h2.DATA, 0, 0, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.DATA, 0, 2, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.DATA, 0, 3, b"x")], ErrorCode.PROTOCOL_ERROR),  # never opened
        ([h2.frame(h2.DATA, h2.PADDED, 1, b"\x05abc")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.DATA, 0, 1, b"x" * 16_385)], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.HEADERS, h2.END_HEADERS | h2.WITH_PRIORITY, 1, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff")], ErrorCode.COMPRESSION_ERROR),
        ([h2.frame(h2.HEADERS, 0, 1, b"a"), h2.frame(h2.PING, 0, 0, b"8 bytes.")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.HEADERS, 0, 1, b"a"), h2.frame(h2.CONTINUATION, 0, 3, b"a")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.HEADERS, 0, 1, b"a"), h2.frame(h2.CONTINUATION, 0, 1, b"")], ErrorCode.ENHANCE_YOUR_CALM),
        (
            [h2.frame(h2.HEADERS, 0, 1, b"a"), *[h2.frame(h2.CONTINUATION, 0, 1, b"a" * 16_000)] * 5],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, b"a")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PUSH_PROMISE, h2.END_HEADERS, 1, b"\0\0\0\2a")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PRIORITY, 0, 1, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.RST_STREAM, 0, 1, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.reset(0, ErrorCode.CANCEL)], ErrorCode.PROTOCOL_ERROR),
        ([h2.reset(9, ErrorCode.CANCEL)], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.SETTINGS, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.SETTINGS, h2.ACK, 0, b"abcdef")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.SETTINGS, 0, 1, b"")], ErrorCode.PROTOCOL_ERROR),
        ([h2.settings({Setting.ENABLE_PUSH: 1})], ErrorCode.PROTOCOL_ERROR),
        ([h2.settings({Setting.INITIAL_WINDOW_SIZE: 2**31})], ErrorCode.FLOW_CONTROL_ERROR),
        ([h2.settings({Setting.MAX_FRAME_SIZE: 16_383})], ErrorCode.PROTOCOL_ERROR),
        ([h2.settings({Setting.MAX_FRAME_SIZE: 2**24})], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PING, 0, 0, b"short")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.PING, 0, 1, b"8 bytes.")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.GOAWAY, 0, 0, b"short")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.GOAWAY, 0, 1, b"8 bytes.")], ErrorCode.PROTOCOL_ERROR),
        ([h2.window_update(0, 0)], ErrorCode.FLOW_CONTROL_ERROR),
        ([h2.window_update(0, 2**31 - 1)], ErrorCode.FLOW_CONTROL_ERROR),
        ([h2.frame(h2.WINDOW_UPDATE, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
    ],
)
async def test_a_broken_protocol_ends_the_connection_and_every_call_on_it(
    peer: Peer, frames: list[bytes], code: ErrorCode
) -> None:
    answer = peer.call()
    peer.sent()
    peer.feed(*frames)
    error = await failed(answer)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert "broke the protocol" in error.message
    kind, _, stream, payload = peer.sent()[-1]
    assert (kind, stream, int.from_bytes(payload[4:8], "big")) == (h2.GOAWAY, 0, code)
    assert peer.wire.closing
    assert not peer.connection.has_room()
    assert peer.left == 1


@pytest.mark.parametrize("first", [h2.frame(h2.PING, 0, 0, b"8 bytes."), h2.frame(h2.SETTINGS, h2.ACK, 0, b"")])
async def test_a_peer_must_begin_with_its_settings(new_peer: type[Peer], first: bytes) -> None:
    peer = new_peer()
    peer.feed(first)
    assert "the first frame" in (peer.connection.settled.result() or "")
    assert peer.wire.closing


async def test_a_server_of_another_protocol_is_no_peer(new_peer: type[Peer]) -> None:
    peer = new_peer()
    peer.feed(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    assert "broke the protocol" in (peer.connection.settled.result() or "")


async def test_unknown_frames_and_settings_are_ignored(peer: Peer) -> None:
    answer = peer.call()
    peer.feed(h2.frame(0xFA, 0xFF, 77, b"whatever"), h2.frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 0xF0F0, 1)))
    peer.feed(h2.frame(h2.PRIORITY, 0, 1, b"\0\0\0\0\1"), *peer.answer(1, b"ok"))
    assert await answer == b"ok"


async def test_pings_are_answered_and_their_answers_are_not(peer: Peer) -> None:
    peer.feed(h2.frame(h2.PING, 0, 0, b"12345678"), h2.frame(h2.PING, h2.ACK, 0, b"87654321"))
    assert peer.sent() == [(h2.PING, h2.ACK, 0, b"12345678")]


async def test_a_peer_that_asks_for_replies_without_reading_them_is_left(peer: Peer) -> None:
    ping = h2.frame(h2.PING, 0, 0, b"12345678")
    peer.feed(*[ping] * 2000)
    assert not peer.wire.closing
    peer.connection.pause_writing()
    peer.feed(*[ping] * 1000)
    assert not peer.wire.closing
    peer.feed(ping)
    assert peer.wire.closing


async def test_what_was_read_is_granted_anew_in_big_steps(new_peer: type[Peer]) -> None:
    peer = new_peer(most_bytes=2**26)
    peer.greet()
    peer.call()
    peer.sent()
    peer.feed(peer.head(1), peer.data(1, b"\x00" + (2**26).to_bytes(4, "big")))
    for _ in range(2**25 // 16_384):
        peer.feed(peer.data(1, b"x" * 16_384))
    ((kind, _, stream, payload),) = peer.sent()
    assert (kind, stream) == (h2.WINDOW_UPDATE, 0)
    assert int.from_bytes(payload, "big") > 2**25


# --- sending


async def test_a_large_request_goes_out_in_frames_as_windows_open(peer: Peer) -> None:
    request = bytes(range(256)) * 400
    answer = peer.call(request)
    _, *data = peer.sent()
    assert sum(len(payload) for *_, payload in data) == h2.DEFAULT_WINDOW
    assert max(len(payload) for *_, payload in data) == h2.DEFAULT_MAX_FRAME
    peer.feed(h2.window_update(0, 2**20))
    assert peer.sent() == []  # the stream's own window is still shut
    peer.feed(h2.window_update(1, 10))
    data += (some := peer.sent())
    assert [len(payload) for *_, payload in some] == [10]
    peer.feed(h2.window_update(1, 2**20))
    data += peer.sent()
    assert b"".join(payload for *_, payload in data) == b"\x00" + len(request).to_bytes(4, "big") + request
    assert [flags for _, flags, _, _ in data] == [0] * (len(data) - 1) + [h2.END_STREAM]
    peer.feed(*peer.answer(1, b"got it"))
    assert await answer == b"got it"


async def test_small_requests_use_up_the_window_of_the_connection_too(peer: Peer) -> None:
    for _ in range(100):
        peer.call(b"x" * 995)
    sent = sum(len(payload) for kind, _, _, payload in peer.sent() if kind == h2.DATA)
    assert sent == h2.DEFAULT_WINDOW
    peer.feed(h2.window_update(0, 2**20))
    assert sent + sum(len(payload) for *_, payload in peer.sent()) == 100 * 1000


async def test_large_requests_share_the_connection_a_frame_each_in_turn(peer: Peer) -> None:
    peer.call(b"a" * 60_000)
    peer.call(b"b" * 60_000)
    peer.sent()
    peer.feed(h2.window_update(0, 40_000))
    assert [stream for _, _, stream, _ in peer.sent()] == [3, 3, 3]  # all of the first had fitted
    peer.call(b"c" * 60_000)
    peer.sent()
    peer.feed(h2.window_update(0, 60_000))
    assert {stream for _, _, stream, _ in peer.sent()} == {3, 5}


async def test_a_peer_that_shrinks_its_windows_later_is_obeyed(peer: Peer) -> None:
    peer.feed(h2.window_update(0, 2**20))
    peer.call(b"x" * 100_000)
    peer.sent()
    peer.greet(INITIAL_WINDOW_SIZE=10)  # 65,535 are out already: the window is below 0
    peer.feed(h2.window_update(1, 65_525))
    assert [kind for kind, *_ in peer.sent()] == [h2.SETTINGS]
    peer.feed(h2.window_update(1, 1))
    assert [payload for kind, _, _, payload in peer.sent()] == [b"x"]
    peer.greet(INITIAL_WINDOW_SIZE=2**20)
    assert sum(len(payload) for _, _, _, payload in peer.sent()) == 100_005 - 65_535 - 1


async def test_frames_grow_with_what_the_peer_takes_but_not_so_far_that_others_wait(peer: Peer) -> None:
    peer.greet(MAX_FRAME_SIZE=2**20, INITIAL_WINDOW_SIZE=2**20)
    peer.feed(h2.window_update(0, 2**20))
    peer.sent()
    peer.call(b"x" * 500_000)
    assert [len(payload) for *_, payload in peer.sent()][1:] == [2**16] * 7 + [500_005 - 7 * 2**16]


async def test_no_more_streams_than_the_peer_allows(peer: Peer) -> None:
    peer.greet(MAX_CONCURRENT_STREAMS=2)
    first, _ = peer.call(), peer.call()
    assert not peer.connection.has_room()
    before = peer.rooms
    peer.feed(*peer.answer(1, b"ok"))
    assert await first == b"ok"
    assert peer.connection.has_room()
    assert peer.rooms == before + 1


async def test_no_new_calls_while_the_peer_does_not_read(peer: Peer) -> None:
    peer.feed(h2.window_update(0, 2**20))
    peer.connection.pause_writing()
    assert not peer.connection.has_room()
    peer.connection.resume_writing()
    assert peer.connection.has_room()
    assert peer.rooms == 2


async def test_a_large_request_pauses_with_the_peer(peer: Peer) -> None:
    peer.greet(INITIAL_WINDOW_SIZE=2**20)
    peer.call(b"x" * 80_000)
    peer.sent()
    peer.connection.pause_writing()
    peer.feed(h2.window_update(0, 2**20))
    assert peer.sent() == []
    peer.connection.resume_writing()
    assert peer.sent()[-1][1] == h2.END_STREAM


async def test_a_call_that_is_abandoned_is_reset_and_its_late_answer_harms_nobody(peer: Peer) -> None:
    peer.greet(MAX_CONCURRENT_STREAMS=2)
    (gone, _), other = peer.exchange(), peer.call()
    peer.sent()
    gone.abandon()
    gone.abandon()
    assert peer.sent() == [(h2.RST_STREAM, 0, 1, h2.UINT32.pack(ErrorCode.CANCEL))]
    assert peer.connection.has_room()
    peer.feed(*peer.answer(1, b"too late"), h2.reset(1, ErrorCode.CANCEL), *peer.answer(3, b"in time"))
    assert await other == b"in time"


async def test_an_abandoned_call_sends_nothing_more(peer: Peer) -> None:
    exchange, _ = peer.exchange(b"x" * 100_000)
    peer.sent()
    exchange.abandon()
    peer.feed(h2.window_update(0, 2**20), h2.window_update(1, 2**20))
    assert [kind for kind, *_ in peer.sent()] == [h2.RST_STREAM]


async def test_an_answer_before_the_request_was_sent_ends_the_request(peer: Peer) -> None:
    answer = peer.call(b"x" * 100_000)
    peer.sent()
    peer.feed(peer.head(1), peer.status(1, 8, ("grpc-message", "too large")))
    assert (await failed(answer)).message == "too large"
    assert peer.sent() == [(h2.RST_STREAM, 0, 1, h2.UINT32.pack(ErrorCode.NO_ERROR))]
    peer.feed(h2.window_update(0, 2**20))
    assert peer.sent() == []


async def test_an_answer_to_a_cancelled_future_is_dropped(peer: Peer) -> None:
    answer = peer.call()
    answer.cancel()
    peer.feed(*peer.answer(1, b"nobody waits"))
    assert len(peer.connection) == 0


# --- the end


def goaway(last: int, code: ErrorCode = ErrorCode.NO_ERROR) -> bytes:
    return h2.frame(h2.GOAWAY, 0, 0, struct.pack(">II", last, code) + b"drained")


async def test_a_peer_that_goes_away_finishes_what_it_took_and_gives_the_rest_back(peer: Peer) -> None:
    taken, (not_taken, _) = peer.call(), peer.exchange()
    peer.feed(goaway(1))
    assert peer.left == 1
    assert peer.given_back == [not_taken]
    assert not peer.connection.has_room()
    assert not peer.wire.closing
    peer.feed(*peer.answer(1, b"still served"))
    assert await taken == b"still served"
    assert peer.wire.closing


async def test_a_call_that_was_refused_unseen_is_given_back(peer: Peer) -> None:
    exchange, answer = peer.exchange(b"x" * 100_000)
    peer.sent()
    peer.feed(h2.reset(1, ErrorCode.REFUSED_STREAM), h2.window_update(0, 2**20))
    assert peer.given_back == [exchange]
    assert not answer.done()
    assert peer.sent() == []


async def test_a_large_request_that_was_given_back_is_not_sent_on_here(peer: Peer) -> None:
    peer.call()  # keeps the connection open
    exchange, _ = peer.exchange(b"x" * 100_000)
    peer.feed(goaway(1))
    assert peer.given_back == [exchange]
    exchange.reset()
    exchange.unsent, exchange.window = memoryview(b"for another connection"), 100
    peer.sent()
    peer.feed(h2.window_update(0, 2**20))
    assert peer.sent() == []


async def test_an_idle_connection_closes_when_the_peer_goes_away(peer: Peer) -> None:
    peer.feed(goaway(2**31 - 1))
    assert peer.wire.closing


async def test_when_the_connection_is_lost_every_call_is_unavailable(peer: Peer) -> None:
    answers = [peer.call() for _ in range(3)]
    peer.connection.connection_lost(ConnectionResetError("reset by peer"))
    for answer in answers:
        error = await failed(answer)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "reset by peer" in error.message
    assert peer.lost
    assert peer.connection.closed.done()


async def test_closing_says_goodbye_and_ends_every_call(peer: Peer) -> None:
    answer = peer.call()
    peer.sent()
    peer.connection.close("we are stopping")
    assert (await failed(answer)).message == "we are stopping"
    assert [kind for kind, *_ in peer.sent()] == [h2.GOAWAY]
    assert peer.wire.closing


async def test_a_connection_whose_stream_numbers_are_used_up_takes_no_more_calls(peer: Peer) -> None:
    peer.connection._next_stream = 2**31 - 1
    answer = peer.call()
    assert peer.left == 1
    assert not peer.connection.has_room()
    peer.feed(*peer.answer(2**31 - 1, b"the last"))
    assert await answer == b"the last"
    assert peer.wire.closing
