"""Sketches of labels and values, tile by tile, as a state keeps them: words of a key and a count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.feature.define import sketches
from services.feature.define.definition import Aggregate
from services.feature.tiles.batch import Batch, Groups
from services.feature.tiles.places import grouped, owners_of, sketch_starts, spans, starts_of, tile_places
from services.feature.tiles.plan import Plan, Run, Sketch
from services.feature.tiles.state import Opened, Words

_KEY_BIT = 39  # of a sketch's word: signed key above, count below
_COUNT = (1 << _KEY_BIT) - 1

TOGETHER: dict[Aggregate, Callable[[Words, Words], Words]] = {
    Aggregate.DISTINCT: np.maximum.reduceat,
    Aggregate.TOP_K: np.add.reduceat,
    Aggregate.QUANTILE: np.add.reduceat,
}
"""How the counts of one key become one."""


def keys_of(words: Words) -> Words:
    return words >> _KEY_BIT


def counts_of(words: Words) -> Words:
    return words & _COUNT


@dataclass(slots=True)
class _Entries:
    """Keys of sketches and their counts, each in the tile at a place."""

    at: Words
    keys: Words
    counts: Words


def sketched(
    plan: Plan, opened: Opened, oldest: Words, groups: Sequence[Groups], batch: Batch, merged: Opened, at: Words
) -> Words:
    """The words of all sketches; sets their counts, and their sizes in the tiles, which are at these places."""
    tiles, counts = merged.tiles, merged.counts
    of_run = {group.run.number: group for group in groups}
    entities, first = len(counts), len(plan.runs) + len(plan.recents)
    owners: list[Words] = []
    words: list[Words] = []
    for run in plan.runs:
        for sketch in run.sketches:
            entries = _old_entries(plan, opened, run, sketch)
            kept = entries.at >= oldest[owners_of(entries.at)]
            if not kept.all():
                entries = _Entries(entries.at[kept], entries.keys[kept], entries.counts[kept])
            if run.number in of_run:
                entries = _combined(sketch, entries, _new_entries(sketch, of_run[run.number], batch))
            starts = starts_of(entries.at)
            rows = at.searchsorted(entries.at[starts])
            if len(at):
                tiles[owners_of(at) % len(plan.runs) == run.number, sketch.column] = 0
            tiles[rows, sketch.column] = np.diff(starts, append=len(entries.at))
            entity = owners_of(entries.at) // len(plan.runs)
            counts[:, first + sketch.number] = np.bincount(entity, minlength=entities)
            owners.append(entity * len(plan.sketches) + sketch.number)
            words.append((entries.keys << _KEY_BIT) + entries.counts)
    return np.concatenate(words)[np.argsort(np.concatenate(owners), kind="stable")]


def _old_entries(plan: Plan, opened: Opened, run: Run, sketch: Sketch) -> _Entries:
    at = tile_places(opened, len(plan.runs))
    mine = owners_of(at) % len(plan.runs) == run.number
    lengths = opened.counts[:, len(plan.runs) + len(plan.recents) + sketch.number]
    words = opened.words[spans(sketch_starts(plan, opened.counts)[:, sketch.number], lengths)]
    sizes = opened.tiles[:-1, sketch.column][mine]
    return _Entries(at[mine].repeat(sizes), keys_of(words), counts_of(words))


def _new_entries(sketch: Sketch, group: Groups, batch: Batch) -> _Entries:
    at = group.places.repeat(group.lengths)
    if sketch.aggregate is Aggregate.QUANTILE:
        values, part = batch.taking_part(sketch.value, group.events)
        return _Entries(at[part], sketches.buckets_of(values[part]), np.ones(int(part.sum()), dtype=np.int64))
    column = batch.labels(sketch.value)
    labels = [column[event] for event in group.events.tolist()]
    at = at[np.array([label is not None for label in labels], dtype=np.bool_)]
    present = [label for label in labels if label is not None]
    if sketch.aggregate is Aggregate.TOP_K:
        return _Entries(at, sketches.codes_of(present), np.ones(len(at), dtype=np.int64))
    return _Entries(at, *sketches.registers_of(present))


def _combined(sketch: Sketch, old: _Entries, new: _Entries) -> _Entries:
    at, keys = np.concatenate((old.at, new.at)), np.concatenate((old.keys, new.keys))
    counts = np.concatenate((old.counts, new.counts))
    at, keys, counts = grouped(at, keys, counts, TOGETHER[sketch.aggregate])
    if sketch.aggregate is Aggregate.TOP_K:
        frequent = _most_frequent(at, keys, counts)
        at, keys, counts = at[frequent], keys[frequent], counts[frequent]
    return _Entries(at, keys, counts)


def _most_frequent(at: Words, keys: Words, counts: Words) -> Words:
    """Which entries stay of tiles that hold too many."""
    starts = starts_of(at)
    lengths = np.diff(starts, append=len(at))
    if not len(at) or lengths.max() <= sketches.MOST_CODES:
        return np.arange(len(at))
    order = np.lexsort((keys, -counts, at))
    rank = np.arange(len(at)) - starts.repeat(lengths)
    return np.sort(order[rank < sketches.MOST_CODES])
