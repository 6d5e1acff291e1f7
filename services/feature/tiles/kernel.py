"""The tile kernel: the same features as the SQL computes, kept up to date event by event and finished at any moment.

    kernel = ViewKernel(view)
    states |= kernel.apply(states, prepare(source, events), positions)
    computed = kernel.rows([states.get(entity) for entity in entities], as_of_us)

A state is bytes: what plan.py lists, as state.py writes it. Which events it has
counted makes it what it is, in whatever order and batches they came, up to the last bits of sums. What it keeps ends
at what its windows reach from its newest event, and five minutes or one step more, whichever is longer: rows are exact
for moments after the newest event, and for those up to so much before it they may count events of the moment's own step
that became known later. Of moments further back, windows may miss what has been left behind. Batches of a source must
come in the order of its log.

A STD of values beyond 1e154, whose squares no number holds, is infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import View
from services.feature.define.events import Events
from services.feature.define.rows import Computed
from services.feature.tiles.batch import Batch
from services.feature.tiles.merge import merge
from services.feature.tiles.plan import compiled
from services.feature.tiles.readout import Readout
from services.feature.tiles.state import POSITIONS, Codec, StateError, Words

LATEST_US = 2**53
"""The last moment there is, in the year 2255: stores compare times as doubles."""


class ViewKernel:
    """damaged, foreign: how many states `rows` could not read, and took for those of unknown entities."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.damaged = self.foreign = 0
        self._plan = compiled(view)
        self._codec = Codec(self._plan)
        self._readout = Readout(self._plan)
        self._read = {
            source.name: {self.view.entity} | {feature.value for feature in view.of(source) if feature.value}
            for source in view.sources
        }

    @property
    def schema_hash(self) -> int:
        """Changes whenever states have to be built anew."""
        return self._plan.schema_hash

    def entities(self, events: Events) -> list[str]:
        """Whom the events concern, each once; nobody where the view does not read their source."""
        if self._plan.source_number(events.source) is None:
            return []
        return list(dict.fromkeys(id_ for id_ in events.entities[self.view.entity] if id_ is not None))

    def check(self, state: bytes) -> None:
        """Raises DamagedState or ForeignState."""
        self._codec.check(state)

    def apply(
        self, states: Mapping[str, bytes | None], events: Events, positions: NDArray[np.int64] | None = None
    ) -> dict[str, bytes]:
        """New states of the entities that the events concern; an entity's old one where all of its were skipped.

        states: of at least those entities, None for one without. events: prepared.
        positions: int64 (n,) of the events in their source's log. What a state of that source has counted up to is
        skipped, and it then stands at the highest; None counts all and leaves positions as they are.
        Raises StateError naming the entity whose state is unreadable, and ValueError; nothing is changed then.
        """
        source = self._plan.source_number(events.source)
        if source is None:
            return {}
        _check(events, positions)
        if lacking := self._read[events.source] - {*events.values, *events.labels, *events.entities}:
            raise ValueError(f"events of {events.source!r} must be prepared and have {min(lacking)!r}")
        ids, entity = _numbered(events.entities[self.view.entity])
        if missing := [id_ for id_ in ids if id_ not in states]:
            raise ValueError(f"states must hold every entity that the events concern, got none for {missing[0]!r}")
        before = [states[id_] for id_ in ids]
        opened = self._codec.open(before)
        for number in (*opened.damaged, *opened.foreign):
            self._raise(ids[number], before[number])
        counts = entity >= 0
        reached = opened.heads[:, POSITIONS + source].copy()
        if positions is not None:
            counts &= _is_new(positions, reached[entity] if len(ids) else positions)
            np.maximum.at(reached, entity[counts], positions[counts])
        batch = _batch(source, events, entity, np.flatnonzero(counts))
        with np.errstate(over="ignore", invalid="ignore"):
            merged = merge(self._plan, opened, batch)
        merged.heads[:, POSITIONS + source] = reached
        concerned = np.bincount(batch.entity, minlength=len(ids)) > 0
        packed = self._codec.pack(merged)
        return {
            id_: new if changed or old is None else old
            for id_, new, old, changed in zip(ids, packed, before, concerned.tolist(), strict=True)
        }

    def at_positions(self, state: bytes, positions: Mapping[str, int]) -> bytes:
        """The state, standing at these positions of its sources' logs. Raises StateError and ValueError."""
        return self._codec.at_positions(state, positions)

    def positions(self, state: bytes) -> dict[str, int]:
        """Of each source's log, up to where the state has counted it; -1 for not at all. Raises StateError."""
        self.check(state)
        reached = self._codec.open([state]).heads[0, POSITIONS:].tolist()
        return {source.name: int(position) for source, position in zip(self._plan.sources, reached, strict=True)}

    def rows(self, states: Sequence[bytes | None], as_of_us: int | Sequence[int]) -> Computed:
        """A row per state, as of one moment or one each, from 0 to 2**53. Unreadable states are of unknown entities."""
        moments = _moments(as_of_us, len(states))
        opened = self._codec.open(states)
        self.damaged += len(opened.damaged)
        self.foreign += len(opened.foreign)
        return self._readout.rows(opened, moments)

    def known_us(self, states: Sequence[bytes | None]) -> Words:
        """known_us of the newest event counted, int64 (n,); 0 where there is none, or the state is unreadable."""
        return self._codec.newest_us(states)

    def _raise(self, entity: str, state: bytes | None) -> None:
        try:
            self.check(state or b"")
        except StateError as error:
            raise type(error)(f"entity {entity!r}: {error}") from None


def _check(events: Events, positions: Words | None) -> None:
    known_us = events.known_us
    if len(events) and not (known_us.min() >= 0 and known_us.max() <= LATEST_US):
        raise ValueError(f"known_us must be from 0 to 2**53, got {known_us.min()} to {known_us.max()}")
    if positions is not None and positions.shape != (len(events),):
        raise ValueError(f"positions must have shape ({len(events)},), got {positions.shape}")


def _moments(as_of_us: int | Sequence[int], n: int) -> Words:
    if isinstance(as_of_us, int):
        if not 0 <= as_of_us <= LATEST_US:
            raise ValueError(f"as_of_us must be from 0 to 2**53, got {as_of_us}")
        return np.array([as_of_us], dtype=np.int64)
    moments = np.array(as_of_us, dtype=np.int64)
    if moments.shape != (n,):
        raise ValueError(f"as_of_us must be one moment or {n}, got shape {moments.shape}")
    if n and not (moments.min() >= 0 and moments.max() <= LATEST_US):
        raise ValueError(f"as_of_us must be from 0 to 2**53, got {moments.min()} to {moments.max()}")
    return moments


def _numbered(column: Sequence[str | None]) -> tuple[list[str], Words]:
    """The distinct ids, and each event's number among them; -1 for none."""
    ids = [id_ for id_ in dict.fromkeys(column) if id_ is not None]
    numbers: dict[str | None, int] = {id_: number for number, id_ in enumerate(ids)}
    numbers[None] = -1
    return ids, np.fromiter(map(numbers.__getitem__, column), np.int64, len(column))


def _is_new(positions: Words, reached: Words) -> NDArray[np.bool_]:
    """Above what was counted, and there for the first time."""
    new = positions > reached
    if (positions[1:] <= positions[:-1]).any():
        first = np.zeros(len(positions), dtype=np.bool_)
        first[np.unique(positions, return_index=True)[1]] = True
        new &= first
    return new


def _batch(source: int, events: Events, entity: Words, which: Words) -> Batch:
    order = which[np.lexsort((events.sequence[which], events.known_us[which], entity[which]))]
    return Batch(source, events, order, entity[order], events.known_us[order], events.sequence[order])
