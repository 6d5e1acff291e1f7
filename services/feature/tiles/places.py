"""Where tiles and rows are: the arithmetic that lets the tiles of many entities be one sorted array.

A tile's place is a number made of its owner, which is one entity's run, and its index in that run. All arrays of places
are sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from services.feature.tiles.plan import Plan
from services.feature.tiles.state import Opened, Words

# a place is owner << 36 | index + 2**35: 2**53 us in steps of a second need 34 bits
_OWNER_BIT = 36
_ZERO = 1 << 35

NONE: Words = np.zeros(0, dtype=np.int64)


def places(owners: Words, indices: Words) -> Words:
    return (owners << _OWNER_BIT) + (indices + _ZERO)


def owner_places(count: int) -> Words:
    """The place of the tile 0 of owners 0, 1, ..."""
    return (np.arange(count, dtype=np.int64) << _OWNER_BIT) + _ZERO


def owners_of(at: Words) -> Words:
    return at >> _OWNER_BIT


def indices_of(at: Words) -> Words:
    return (at & ((1 << _OWNER_BIT) - 1)) - _ZERO


def tile_places(opened: Opened, runs: int) -> Words:
    """The place of every tile."""
    lengths = opened.counts[:, :runs].ravel()
    at = owner_places(len(lengths)).repeat(lengths)
    at += opened.tiles[:-1, 0]
    return at


def sketch_starts(plan: Plan, counts: Words) -> Words:
    """Where the words of each entity's sketches start, (k, sketches)."""
    lengths = counts[:, len(plan.runs) + len(plan.recents) :]
    return (lengths.ravel().cumsum() - lengths.ravel()).reshape(lengths.shape)


def spans(starts: Words, lengths: Words) -> Words:
    """starts[0], starts[0] + 1, ... lengths[0] of them, then those from starts[1]."""
    ends = lengths.cumsum()
    begin: Words = starts - ends + lengths
    found = begin.repeat(lengths)
    found += np.arange(len(found))
    return found


def starts_of(ordered: Words) -> Words:
    """Where each run of equal numbers starts."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(ordered) else NONE


def grouped(
    owners: Words, keys: Words, counts: Words, together: Callable[[Words, Words], Words]
) -> tuple[Words, Words, Words]:
    """One entry per owner and key, in their order, its counts taken together."""
    order = np.lexsort((keys, owners))
    owners, keys, counts = owners[order], keys[order], counts[order]
    if not len(owners):
        return owners, keys, counts
    change = (owners[1:] != owners[:-1]) | (keys[1:] != keys[:-1])
    starts = np.flatnonzero(np.concatenate(([True], change)))
    return owners[starts], keys[starts], together(counts, starts)
