"""Whatever a peer sends: each call ends once, with its own answer or a CalleeError, and nothing else is raised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from services.mesh import h2frames as h2
from services.mesh.errors import CalleeError

CALLS = 3


def outcomes(new_peer: Any, feed: Callable[[Any], None], *, greeted: bool = True) -> list[bytes | CalleeError]:
    """How CALLS calls ended, after `feed` and the loss of the connection."""

    async def converse() -> list[bytes | CalleeError]:
        peer = new_peer()
        answers = []
        if greeted:
            peer.greet()
            answers = [peer.call(b"ask" * 10_000 * number) for number in range(CALLS)]
        feed(peer)
        peer.connection.connection_lost(None)
        for exchange in peer.given_back:
            exchange.fail(grpc.StatusCode.UNAVAILABLE, "given back")
        assert all(answer.done() for answer in answers)
        results = await asyncio.gather(*answers, return_exceptions=True)
        for result in results:
            assert isinstance(result, bytes | CalleeError), repr(result)
        return results  # type: ignore[return-value]

    return asyncio.run(converse())


def conversation(peer: Any) -> list[bytes]:
    """Frames of a well-behaved peer that answers every call with the number of its stream."""
    streams = [1 + 2 * number for number in range(CALLS)]
    frames = [h2.frame(h2.PING, 0, 0, b"12345678"), h2.window_update(0, 1000), h2.settings({})]
    for stream in streams:
        frames += peer.answer(stream, b"%d" % stream * 40)
    return frames


def own(number: int) -> bytes:
    return b"%d" % (1 + 2 * number) * 40


@settings(max_examples=150)
@given(data=st.binary(max_size=600), greeted=st.booleans())
def test_random_bytes(new_peer: Any, data: bytes, greeted: bool) -> None:
    outcomes(new_peer, lambda peer: peer.feed(data), greeted=greeted)


FRAMES = st.lists(
    st.builds(
        h2.frame,
        st.integers(0, 11),
        st.integers(0, 255),
        st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1]),
        st.one_of(st.binary(max_size=40), st.sampled_from([b"\x00\x00\x00\x00\x01x", b"\0\0\0\1", b"\0" * 8, b""])),
    ),
    max_size=12,
)


@settings(max_examples=250)
@given(FRAMES, st.integers(1, 100))
def test_random_frames(new_peer: Any, frames: list[bytes], piece: int) -> None:
    outcomes(new_peer, lambda peer: peer.feed(*frames, piece=piece))


@settings(max_examples=250)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 7)), min_size=1, max_size=6), st.integers(1, 200))
def test_flipped_bits(new_peer: Any, flips: list[tuple[int, int]], piece: int) -> None:
    def feed(peer: Any) -> None:
        data = bytearray(b"".join(conversation(peer)))
        for at, bit in flips:
            data[at % len(data)] ^= 1 << bit
        peer.feed(bytes(data), piece=piece)

    outcomes(new_peer, feed)


@settings(max_examples=250)
@given(st.data())
def test_frames_lost_repeated_or_out_of_order_never_answer_another_call(new_peer: Any, data: st.DataObject) -> None:
    def feed(peer: Any) -> None:
        frames = conversation(peer)
        chosen = data.draw(st.lists(st.sampled_from(range(len(frames))), max_size=2 * len(frames)))
        peer.feed(*(frames[index] for index in chosen))

    for number, result in enumerate(outcomes(new_peer, feed)):
        assert isinstance(result, CalleeError) or result == own(number)


@settings(max_examples=60)
@given(st.integers(1, 300))
def test_a_good_conversation_is_understood_in_pieces_of_any_size(new_peer: Any, piece: int) -> None:
    results = outcomes(new_peer, lambda peer: peer.feed(*conversation(peer), piece=piece))
    assert results == [own(number) for number in range(CALLS)]
