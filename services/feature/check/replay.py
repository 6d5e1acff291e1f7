"""A day replayed from its events: kept up to date one by one as a stream does, and counted anew for every request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import Source, View
from services.feature.define.events import Events, from_arrow, prepare
from services.feature.define.rows import Computed
from services.feature.offline.store import OfflineStore
from services.feature.tiles.kernel import ViewKernel

DAY_US = 86_400_000_000
_ENTITIES = 100
_MOST_COUNTED = 5_000_000  # events, for all requests of a view together: about two seconds
_FEWEST = 20  # requests, however many events each has to count
_READ_AT_ONCE = 256  # states; those of long windows may be large

Pairs = set[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Moments of one day to compare at: (entity, moment) pairs in the order of time."""

    entity_ids: Sequence[str]
    as_of_us: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.entity_ids)

    def take(self, which: NDArray[np.int64]) -> Sample:
        return Sample([self.entity_ids[at] for at in which.tolist()], self.as_of_us[which])


def events_of(offline: OfflineStore, view: View, begin_us: int, random: np.random.Generator) -> list[Events]:
    """All events of some entities that had one on the day, up to its end: per source, in the order they count."""
    active = offline.active(view, begin_us, begin_us + DAY_US)
    chosen = sorted(active[at] for at in random.permutation(len(active))[:_ENTITIES].tolist())
    found = []
    for source in view.sources:
        table = offline.events(view, source, chosen, begin_us + DAY_US)
        found.append(_read_by(view, source, prepare(source, from_arrow(source, table))))
    return found


def _read_by(view: View, source: Source, events: Events) -> Events:
    """Without columns that the view does not read: to carry them along would be most of the work."""
    read = {view.entity, *(feature.value for feature in view.of(source))}
    return Events(
        events.source,
        events.sequence,
        events.event_us,
        events.known_us,
        {name: column for name, column in events.entities.items() if name in read},
        {name: column for name, column in events.values.items() if name in read},
        {name: column for name, column in events.labels.items() if name in read},
    )


def sampled(view: View, events: Sequence[Events], begin_us: int, rows: int, random: np.random.Generator) -> Sample:
    """About `rows` moments: half around the day's events, half where events are about to leave a window or just did."""
    pairs: Pairs = set()
    borders = [(batch, *border) for batch in events for border in _borders(view, batch.source)]
    for batch in events:
        pairs |= _around(view, batch, begin_us, rows // (2 * len(events)), random)
    for batch, window_us, step_us in borders:
        pairs |= _leaving(view, batch, window_us, step_us, begin_us, rows // (2 * len(borders)), random)
    ordered = sorted(pairs)
    return Sample([entity_id for _, entity_id in ordered], np.array([moment for moment, _ in ordered], np.int64))


def _borders(view: View, source: str) -> list[tuple[int, int]]:
    """The windows over a source, and the step of their far end, 0 where it is exact; microseconds."""
    return sorted({(f.window_us, f.step_us) for f in view.features if f.source.name == source and f.window})


def _around(view: View, events: Events, begin_us: int, count: int, random: np.random.Generator) -> Pairs:
    """The moment an event is known, which does not count it yet; the one after, which does; and any later."""
    at = np.flatnonzero(events.known_us >= begin_us)
    picked = random.permutation(at)[: max(1, count // 3)]
    known_us = events.known_us[picked]
    later_us = known_us + random.integers(2, DAY_US // 2, len(picked))
    moments = np.stack([known_us, known_us + 1, np.minimum(later_us, begin_us + DAY_US)])
    return _pairs(view, events, picked, moments)


def _leaving(
    view: View,
    events: Events,
    window_us: int,
    step_us: int,
    begin_us: int,
    count: int,
    random: np.random.Generator,
) -> Pairs:
    """The last moment at which a window still has an event, and the first at which it has not."""
    known_us = events.known_us
    leaves_us = (known_us // step_us + window_us // step_us + 1) * step_us if step_us else known_us + window_us + 1
    at = np.flatnonzero((leaves_us > begin_us) & (leaves_us <= begin_us + DAY_US))
    picked = random.permutation(at)[: max(1, count // 2)]
    return _pairs(view, events, picked, np.stack([leaves_us[picked] - 1, leaves_us[picked]]))


def _pairs(view: View, events: Events, picked: NDArray[np.int64], moments: NDArray[np.int64]) -> Pairs:
    """moments: (any, picked)."""
    ids = events.entities[view.entity]
    return {
        (moment, entity_id)
        for at, column in zip(picked.tolist(), moments.T.tolist(), strict=True)
        for moment in column
        if (entity_id := ids[at]) is not None
    }


def streamed(view: View, events: Sequence[Events], sample: Sample, begin_us: int) -> Computed:
    """States built from what was known before the day, then kept up to date batch by batch and read in between."""
    kernel = ViewKernel(view)
    states: dict[str, bytes | None] = dict.fromkeys(sample.entity_ids)
    done = [0] * len(events)

    def catch_up(moment_us: int) -> None:
        for number, batch in enumerate(events):
            upto = int(np.searchsorted(batch.known_us, moment_us))
            if upto > done[number]:
                some = _slice(batch, done[number], upto)
                for entity_id in kernel.entities(some):
                    states.setdefault(entity_id, None)
                states.update(kernel.apply(states, some, np.arange(done[number] + 1, upto + 1, dtype=np.int64)))
                done[number] = upto

    catch_up(begin_us)
    rows, seen = [], list[bytes | None]()
    for moment, members in _moments_of(sample):
        catch_up(moment)
        seen += [states[member] for member in members]
    for start in range(0, len(seen), _READ_AT_ONCE):
        end = min(len(seen), start + _READ_AT_ONCE)
        rows.append(kernel.rows(seen[start:end], sample.as_of_us[start:end].tolist()))
    return _stacked(rows)


def request_by_request(view: View, events: Sequence[Events], sample: Sample) -> Computed:
    """Each row from nothing but the events, as if there were no store."""
    kernel = ViewKernel(view)
    asked = set(sample.entity_ids)
    histories = [_histories(batch, view.entity, asked) for batch in events]
    rows = []
    for entity_id, moment in zip(sample.entity_ids, sample.as_of_us.tolist(), strict=True):
        states: dict[str, bytes | None] = {entity_id: None}
        for by_entity in histories:
            history = by_entity.get(entity_id)
            known = int(np.searchsorted(history.known_us, moment)) if history is not None else 0
            if history is not None and known:
                states |= kernel.apply(states, _slice(history, 0, known))
        rows.append(kernel.rows([states[entity_id]], moment))
    return _stacked(rows)


def affordable(events: Sequence[Events], entity: str, most: int) -> int:
    """How many requests to replay, `most` at most: each counts all events of its entity anew."""
    entities = {entity_id for batch in events for entity_id in batch.entities[entity]}
    each = sum(map(len, events)) / max(1, len(entities))
    return min(most, max(_FEWEST, round(_MOST_COUNTED / max(1.0, each))))


def _histories(events: Events, entity: str, asked: set[str]) -> dict[str, Events]:
    """Entity -> its events, in order."""
    places: dict[str, list[int]] = {}
    for at, entity_id in enumerate(events.entities[entity]):
        if entity_id in asked:
            places.setdefault(entity_id, []).append(at)
    return {entity_id: events.take(np.array(some, np.int64)) for entity_id, some in places.items()}


def _slice(events: Events, start: int, end: int) -> Events:
    """Views of numbers, copies of texts."""
    at = slice(start, end)
    return Events(
        events.source,
        events.sequence[at],
        events.event_us[at],
        events.known_us[at],
        {name: column[at] for name, column in events.entities.items()},
        {name: (values[at], null[at]) for name, (values, null) in events.values.items()},
        {name: column[at] for name, column in events.labels.items()},
    )


def _moments_of(sample: Sample) -> Iterator[tuple[int, Sequence[str]]]:
    """Every moment in order, with who is asked about at it."""
    moments, starts = np.unique(sample.as_of_us, return_index=True)
    ends = [*starts[1:].tolist(), len(sample)]
    for moment, start, end in zip(moments.tolist(), starts.tolist(), ends, strict=True):
        yield moment, sample.entity_ids[start:end]


def _stacked(rows: Sequence[Computed]) -> Computed:
    return Computed(
        np.concatenate([row.values for row in rows]),
        np.concatenate([row.null for row in rows]),
        np.concatenate([row.known for row in rows]),
    )
