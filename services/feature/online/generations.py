"""The generations of a view: whole sets of rows, of which one is published.

A materialisation begins a generation, loads its rows while nobody reads them, and publishes it by turning one pointer.
Readers learn of that a little later, so the generation before stays for a grace. Every generation that has rows in the
store is listed from before its first row until after its last, so that whatever crashes in between, somebody finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

MOST_UNFINISHED = 3  # of a view; whoever crashes while loading, again and again, must not fill the store
LONGEST_LOAD_S = 86_400.0
UNREAD = 1
"""When a generation was retired that nobody ever read: it needs no grace."""


class Generation(msgspec.Struct, frozen=True):
    """One set of rows.

    begun_us: microseconds since 1970 UTC.
    retired_us: since when it is no longer published, or will never be; 0 for neither.
    """

    number: int
    begun_us: int
    retired_us: int = 0


Listed = Sequence[Generation]
_decoder = msgspec.json.Decoder(list[Generation])


def read(text: bytes | None) -> list[Generation]:
    """Raises ValueError where the text is damaged."""
    return _decoder.decode(text) if text else []


def begun(listed: Listed, number: int, published: int, now_us: int) -> list[Generation]:
    """With one more; the oldest unfinished are given up where there would be too many."""
    unfinished = [one.number for one in listed if not one.retired_us and one.number != published]
    given_up = sorted(unfinished)[: max(0, len(unfinished) + 1 - MOST_UNFINISHED)]
    kept = [retired(one, UNREAD) if one.number in given_up else one for one in listed]
    return [*kept, Generation(number, now_us)]


def flipped(listed: Listed, number: int, before: int, now_us: int) -> list[Generation]:
    """With `number` published instead of `before`.

    Rows may be of generation 0 without anybody having begun it.
    """
    others = [one for one in listed if one.number not in (number, before)]
    ours = next((one for one in listed if one.number == number), Generation(number, now_us))
    if number == before:
        return [*others, ours]
    last = next((one for one in listed if one.number == before), Generation(before, now_us))
    return [*others, retired(last, now_us), ours]


def given_up(listed: Listed, number: int) -> list[Generation]:
    """With `number`, which nobody ever read, never to be published."""
    others = [one for one in listed if one.number != number]
    ours = next((one for one in listed if one.number == number), Generation(number, UNREAD))
    return [*others, retired(ours, UNREAD)]


def open_for_publishing(listed: Listed, number: int) -> bool:
    return any(one.number == number and not one.retired_us for one in listed)


def over(listed: Listed, published: int, now_us: int, grace_us: int) -> list[int]:
    """The generations that nobody reads any more and nobody will."""
    longest_us = round(LONGEST_LOAD_S * 1e6)
    return [
        one.number
        for one in listed
        if one.number != published
        and (one.retired_us + grace_us <= now_us if one.retired_us else one.begun_us + longest_us <= now_us)
    ]


def retired(one: Generation, retired_us: int) -> Generation:
    """The first time counts: readers left then."""
    return one if one.retired_us else Generation(one.number, one.begun_us, retired_us)
