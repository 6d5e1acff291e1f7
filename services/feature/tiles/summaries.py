"""Sketches into values: what the tiles of a window have seen, taken together at the moment of reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.feature.define import sketches
from services.feature.define.definition import Aggregate, Feature
from services.feature.tiles.places import grouped, sketch_starts, spans
from services.feature.tiles.plan import Plan, Sketch
from services.feature.tiles.sketched import TOGETHER, counts_of, keys_of
from services.feature.tiles.state import Opened, Words

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ZERO = np.zeros(1, dtype=np.int64)


@dataclass(slots=True)
class Summary:
    """Features of one sketch over one window. columns: where each one's first value goes."""

    plan: Plan
    sketch: Sketch
    run: int
    window: int
    features: list[Feature] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)

    def finish(self, opened: Opened, begin: Words, end: Words, values: Floats, null: Bools) -> None:
        """begin, end: every window's tiles, (k, windows)."""
        owners, keys, counts = self._entries(opened, begin[:, self.window], end[:, self.window])
        for feature, column in zip(self.features, self.columns, strict=True):
            columns = slice(column, column + len(feature.columns))
            if feature.aggregate is Aggregate.DISTINCT:
                values[:, column] = _distincts(owners, counts, len(values))
            elif feature.aggregate is Aggregate.TOP_K:
                _tops(owners, keys, counts, values[:, columns], null[:, columns])
            else:
                _quantiles(feature.parameter, owners, keys, counts, values[:, column], null[:, column])

    def _entries(self, opened: Opened, begin: Words, end: Words) -> tuple[Words, Words, Words]:
        """Of each entity, in order: the keys in the window and their counts, taken together over its tiles."""
        lengths = opened.counts[:, : len(self.plan.runs)]
        run_begin = (lengths.ravel().cumsum() - lengths.ravel()).reshape(lengths.shape)[:, self.run]
        # columns of other runs are not sizes, but every difference below is within this one
        before = np.concatenate((_ZERO, opened.tiles[:, self.sketch.column].cumsum()))
        sizes = before[end] - before[begin]
        starts = sketch_starts(self.plan, opened.counts)[:, self.sketch.number] + before[begin] - before[run_begin]
        words = opened.words[spans(starts, sizes)]
        owners = np.arange(len(begin)).repeat(sizes)
        return grouped(owners, keys_of(words), counts_of(words), TOGETHER[self.sketch.aggregate])


def summaries_of(plan: Plan, window_of: Mapping[str, int], place_of: Mapping[str, int], begin: int) -> list[Summary]:
    """window_of, place_of: by a feature's name; begin: the column that places count from."""
    found: dict[tuple[int, int], Summary] = {}
    for feature in plan.view.features:
        if feature.name in place_of:
            run, window = plan.run_of(feature), window_of[feature.name]
            sketch = run.sketch_of(feature)
            summary = found.setdefault((sketch.number, window), Summary(plan, sketch, run.number, window))
            summary.features.append(feature)
            summary.columns.append(begin + place_of[feature.name])
    return list(found.values())


def _distincts(owners: Words, ranks: Words, k: int) -> Floats:
    harmonic = np.bincount(owners, np.exp2(-ranks), minlength=k).astype(np.float64)
    return sketches.distinct(np.bincount(owners, minlength=k), harmonic)


def _tops(owners: Words, keys: Words, counts: Words, values: Floats, null: Bools) -> None:
    order = np.lexsort((keys, -counts, owners))
    entities = np.bincount(owners, minlength=len(values))
    rank = np.arange(len(owners)) - (entities.cumsum() - entities).repeat(entities)
    top = rank < values.shape[1]
    null[:] = True
    null[owners[top], rank[top]] = False
    values[owners[top], rank[top]] = keys[order[top]]


def _quantiles(q: float, owners: Words, keys: Words, counts: Words, values: Floats, null: Bools) -> None:
    below = counts.cumsum()
    entries = np.bincount(owners, minlength=len(values))
    some = entries > 0
    null[:] = ~some
    ends = np.concatenate((_ZERO, below))[entries.cumsum()][some]
    starts = np.concatenate((_ZERO, ends[:-1])) if len(ends) else ends
    wanted = starts + sketches.ranks_of(q, ends - starts)
    values[some] = sketches.bucket_values(keys[below.searchsorted(wanted, side="right")])
