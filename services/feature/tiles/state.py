"""What a stream keeps per (view, entity), as bytes.

    offset  bytes
    0       3     magic "tfs"
    3       1     layout version, 1
    4       8     schema hash of the view's plan, unsigned
    12      8     known_us of the newest event counted, signed; 0 for none
    20      8     known_us of the oldest
    28      8 s   of each source, the highest position of its log that was counted, signed; -1 for none
    ...     8 c   how many rows or words each section has: one of tiles per run, one of events per source whose latest
                  events are kept, one of words per sketch
    ...     8 w   the sections, in that order, each in ascending order
    -4      4     CRC-32 of everything before

All little-endian, and all of it words: the states of many entities are taken apart with a few calls, not one by one.
A sketch's word is its key in the upper 25 bits, signed, and its count in the lower 39; the words of a run's tiles
follow one another, and each tile says how many are its own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from services.feature.tiles.plan import Plan

MAGIC = b"tfs\x01"  # with the layout's version
NO_POSITION = -1
NEWEST, OLDEST, POSITIONS = 0, 1, 2
"""Columns of a head."""
NULL_BITS = 0x7FF8_6E75_6C6C_0000
"""How a null is kept among values: a NaN that no value has."""
_HEAD_AT = 12
_NEVER = np.iinfo(np.int64).max
_LAST_INDEX = 1 << 34  # of a tile: 2**53 us in steps of a second; places.py has room for no more
# the CRC-32 of anything that ends in its own CRC-32: one call checks a state without slicing it
_INTACT = 0x2144DF1C

Words = NDArray[np.int64]


class StateError(Exception):
    """A state that cannot be continued; it has to be built again from its events."""


class DamagedState(StateError):
    """Its bytes are not what was written."""


class ForeignState(StateError):
    """It was written for another plan; to read it with ours would be to guess."""


@dataclass(slots=True)
class Opened:
    """k states taken apart.

    heads: (k, 2 + sources): newest, oldest, positions. counts: (k, sections).
    tiles: (n + 1, tile words), state by state and run by run; the last row belongs to none.
    recents: (m, recent words), state by state and source by source. words: of sketches, likewise.
    damaged, foreign: which of the states were not readable; they are empty here.
    """

    heads: Words
    counts: Words
    tiles: Words
    recents: Words
    words: Words
    damaged: Sequence[int] = ()
    foreign: Sequence[int] = ()


class Codec:
    """Takes apart and puts together the states of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._view, self._schema_hash = plan.view.name, plan.schema_hash
        self._sources = [source.name for source in plan.sources]
        self._prefix = MAGIC + struct.pack("<Q", plan.schema_hash)
        self._runs, self._recents, self._sketches = len(plan.runs), len(plan.recents), len(plan.sketches)
        self._heads = POSITIONS + len(plan.sources)
        self._runs_end = self._heads + self._runs
        self._recents_end = self._runs_end + self._recents
        self._columns = self._recents_end + self._sketches
        self._body_at = _HEAD_AT + 8 * self._columns
        self._head = struct.Struct(f"<{self._columns}q").unpack_from
        self._tile_words, self._recent_words = plan.tile_words, plan.recent_words
        self._no_tile = bytes(8 * plan.tile_words)
        self._run_of = np.array([run.number for run in plan.runs for _ in run.sketches], dtype=np.int64)
        self._own = self._run_of * self._sketches + np.arange(self._sketches)
        self._size_at = np.array([sketch.column for sketch in plan.sketches], dtype=np.int64)
        head = [0, _NEVER] + [NO_POSITION] * len(plan.sources) + [0] * (self._columns - self._heads)
        body = self._prefix + struct.pack(f"<{len(head)}q", *head)
        self.empty = body + struct.pack("<I", crc32(body))
        """The state of an entity of which nothing is known."""

    def check(self, state: bytes) -> None:
        """Raises DamagedState or ForeignState."""
        if not self._is_ours(state) or self._ends(state) is None or self.open([state]).damaged:
            raise self._problem(state)

    def open(self, states: Sequence[bytes | None]) -> Opened:
        """None, damaged and foreign states are empty."""
        opened = self._open(states)
        wrong = self._contradicting(opened.counts, opened.tiles[:-1])
        if not len(wrong):
            return opened
        left = list(states)
        for number in wrong:
            left[number] = None
        good = self._open(left)
        good.damaged = sorted((*good.damaged, *wrong))
        return good

    def _open(self, states: Sequence[bytes | None]) -> Opened:
        body_at, empty = self._body_at, self.empty
        heads, tiles, recents, words = [], [], [], []
        damaged: list[int] = []
        foreign: list[int] = []
        for number, given in enumerate(states):
            state = given or empty
            ends = self._ends(state) if self._is_ours(state) else None
            if given is not None and (ends is None or not given):
                problem = self._problem(given)
                (foreign if isinstance(problem, ForeignState) else damaged).append(number)
                state = empty
            tiles_end, recents_end = ends or (body_at, body_at)
            heads.append(state[_HEAD_AT:body_at])
            tiles.append(state[body_at:tiles_end])
            recents.append(state[tiles_end:recents_end])
            words.append(state[recents_end:-4])
        tiles.append(self._no_tile)
        head = _words(heads, self._columns)
        return Opened(
            head[:, : self._heads],
            head[:, self._heads :],
            _words(tiles, self._tile_words),
            _words(recents, self._recent_words) if self._recents else _NO_WORDS.reshape(0, self._recent_words),
            _words(words, 1).reshape(-1) if self._sketches else _NO_WORDS,
            damaged,
            foreign,
        )

    def _contradicting(self, counts: Words, tiles: Words) -> Sequence[int]:
        """Of k states taken apart, those whose tiles cannot be: what follows would take them for those of others.

        Their checksums hold, so it was not chance that made them so.
        """
        lengths = counts[:, : self._runs].ravel()
        owners = np.arange(len(lengths)).repeat(lengths)
        indices = tiles[:, 0]
        wrong = (indices > _LAST_INDEX) | (indices < -_LAST_INDEX)
        wrong[1:] |= (indices[1:] <= indices[:-1]) & (owners[1:] == owners[:-1])
        found = set((owners[wrong] // self._runs).tolist()) if np.count_nonzero(wrong) else set()
        return sorted(found | self._missized(counts, lengths, owners, tiles)) if self._sketches else sorted(found)

    def _missized(self, counts: Words, lengths: Words, owners: Words, tiles: Words) -> set[int]:
        """Of k states, those whose tiles have sketches of other sizes than the state has words."""
        given = tiles.take(self._size_at, axis=1)
        before = np.concatenate((np.zeros((1, self._sketches), dtype=np.int64), given.cumsum(axis=0)))
        ends = lengths.cumsum()
        # of every sketch in every run; a column is a size in its own run only
        sizes = (before.take(ends, axis=0) - before.take(ends - lengths, axis=0)).reshape(
            len(counts), self._runs * self._sketches
        )
        unfit = sizes.take(self._own, axis=1) != counts[:, self._recents_end - self._heads :]
        found = set(np.flatnonzero(unfit.any(axis=1)).tolist()) if np.count_nonzero(unfit) else set()
        if len(given) and given.min() < 0:
            negative = (given < 0) & (owners[:, np.newaxis] % self._runs == self._run_of)
            found |= set((owners[negative.any(axis=1)] // self._runs).tolist())
        return found

    def newest_us(self, states: Sequence[bytes | None]) -> Words:
        """(k,), 0 of damaged and foreign states."""
        readable = [state or self.empty for state in states]
        found = [self._head(s, _HEAD_AT)[NEWEST] if self._is_ours(s) and self._ends(s) else 0 for s in readable]
        return np.array(found, dtype=np.int64)

    def pack(self, opened: Opened) -> list[bytes]:
        """One state per head."""
        prefix, body_at = self._prefix, self._body_at - _HEAD_AT
        runs, recents = self._runs, self._runs + self._recents
        counts = opened.counts
        heads = np.ascontiguousarray(np.hstack((opened.heads, counts)), dtype="<i8").tobytes()
        tiles, latest, words = (
            np.ascontiguousarray(part, "<i8").tobytes() for part in (opened.tiles, opened.recents, opened.words)
        )
        tiles_end = (counts[:, :runs].sum(axis=1) * (8 * self._tile_words)).cumsum().tolist()
        latest_end = (counts[:, runs:recents].sum(axis=1) * (8 * self._recent_words)).cumsum().tolist()
        words_end = (counts[:, recents:].sum(axis=1) * 8).cumsum().tolist()
        states = []
        a = b = c = 0
        at = 0
        for tile_end, event_end, word_end in zip(tiles_end, latest_end, words_end, strict=True):
            body = b"".join(
                (prefix, heads[at : at + body_at], tiles[a:tile_end], latest[b:event_end], words[c:word_end])
            )
            states.append(body + crc32(body).to_bytes(4, "little"))
            at, a, b, c = at + body_at, tile_end, event_end, word_end
        return states

    def at_positions(self, state: bytes, positions: Mapping[str, int]) -> bytes:
        """The state, standing at these positions of its sources' logs. Raises StateError, and ValueError."""
        self.check(state)
        changed = bytearray(state[:-4])
        for source, position in positions.items():
            if source not in self._sources:
                raise ValueError(f"positions must be of {', '.join(self._sources)}, got {source!r}")
            struct.pack_into("<q", changed, _HEAD_AT + 8 * (POSITIONS + self._sources.index(source)), position)
        return bytes(changed) + crc32(changed).to_bytes(4, "little")

    def _is_ours(self, state: bytes) -> bool:
        return state.startswith(self._prefix) and len(state) >= self._body_at + 4 and crc32(state) == _INTACT

    def _ends(self, state: bytes) -> tuple[int, int] | None:
        """Where its tiles and its latest events end; None where its counts do not fit its length."""
        head = self._head(state, _HEAD_AT)
        tiles_end: int = self._body_at + 8 * self._tile_words * sum(head[self._heads : self._runs_end])
        recents_end = tiles_end + 8 * self._recent_words * sum(head[self._runs_end : self._recents_end])
        end = recents_end + 8 * sum(head[self._recents_end :]) + 4
        return (tiles_end, recents_end) if end == len(state) and min(head[self._heads :]) >= 0 else None

    def _problem(self, state: bytes) -> StateError:
        """What is wrong with a state that is not readable."""
        whole = len(state) >= _HEAD_AT + 4 and state.startswith(MAGIC) and crc32(state) == _INTACT
        found = struct.unpack_from("<Q", state, len(MAGIC))[0] if whole else self._schema_hash
        if found != self._schema_hash:
            expected = self._schema_hash
            return ForeignState(f"a state of view {self._view!r} has schema {found:016x}, expected {expected:016x}")
        return DamagedState(f"a state of view {self._view!r} is damaged: {len(state)} bytes, {state[:4]!r}...")


_NO_WORDS = np.zeros(0, dtype=np.int64)


def _words(parts: Sequence[bytes], width: int) -> Words:
    return np.frombuffer(b"".join(parts), "<i8").reshape(-1, width)
