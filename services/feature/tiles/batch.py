"""Events in the order in which they count, and grouped by the tiles that they fall into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.feature.define.events import Events
from services.feature.tiles.plan import Run
from services.feature.tiles.state import NULL_BITS, Words

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LARGEST = 1e300  # of a value that takes part
_NAN_BITS = 0x7FF8_0000_0000_0000


@dataclass(slots=True)
class Batch:
    """n events that count, of one source, sorted by entity, then known_us, then sequence.

    entity: number of the entity among the states, (n,).
    """

    source: int
    events: Events
    order: Words
    entity: Words
    known_us: Words
    sequence: Words

    def taking_part(self, value: str, which: Words) -> tuple[Floats, Bools]:
        """Of those events: the values, 0 where they take no part, and which do."""
        values, null = self.events.values[value]
        chosen = self.order[which]
        values = values[chosen]
        part = (np.abs(values) <= LARGEST) & ~null[chosen]
        return np.where(part, values, 0.0), part

    def bits(self, value: str, which: Words) -> Words:
        """The values as they are, as words."""
        values, null = self.events.values[value]
        chosen = self.order[which]
        bits = np.ascontiguousarray(values[chosen], dtype=np.float64).view(np.int64).copy()
        bits[np.isnan(values[chosen])] = _NAN_BITS
        bits[null[chosen]] = NULL_BITS
        return bits

    def labels(self, label: str) -> list[str | None]:
        found = self.events.labels if label in self.events.labels else self.events.entities
        column = found[label]
        return [column[at] for at in self.order.tolist()]


@dataclass(slots=True)
class Groups:
    """A run's share of a batch: m groups of events, one per tile.

    events: those that no tile of their run has left behind. starts, lengths, places: (m,).
    """

    run: Run
    events: Words
    starts: Words
    lengths: Words
    places: Words
