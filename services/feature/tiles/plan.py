"""What a view's features need to be kept of its events, worked out once: runs of tiles, recent events, sketches.

A run is the tiles of one source in one step; features without a window share a run with a single, endless tile. A
tile is a row of 8-byte words, the same width in all runs of a view, so that the tiles of many entities are one matrix:

    tile index | counts, sums and spreads, which add | minima and negated maxima | first event | sizes of sketches

A recent event is a row of words too: known_us, sequence, values. Source after source keeps its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from services.feature.define.definition import Aggregate, Feature, Source, View

ENDLESS_US = 1 << 62
"""The step of a tile that holds everything: its index is 0, or -1 before 1970."""
LAYOUT = 1

_COUNTED = (Aggregate.COUNT, Aggregate.MEAN, Aggregate.STD)
_SUMMED = (Aggregate.SUM, Aggregate.MEAN, Aggregate.STD)
_SKETCHED = (Aggregate.DISTINCT, Aggregate.TOP_K, Aggregate.QUANTILE)


@dataclass(frozen=True, slots=True)
class Moments:
    """Where a run keeps how many values took part, their sum, and the sum of squares around their mean; -1: nowhere.

    The three stand side by side where all are kept.
    """

    value: str
    count: int = -1
    total: int = -1
    spread: int = -1


@dataclass(frozen=True, slots=True)
class Sketch:
    """number: its place among the view's. column: where a tile keeps the sketch's size."""

    number: int
    aggregate: Aggregate
    value: str
    column: int


@dataclass(frozen=True, slots=True)
class Run:
    """Tiles of `step_us`, the last `steps` of which some window reaches.

    events: the column of the number of events, -1 for none. firsts, minima, maxima: value -> column.
    first: the columns of the first event's known_us and, after it, sequence; -1 for none.
    """

    number: int
    source: int
    step_us: int
    steps: int
    events: int
    moments: Sequence[Moments]
    minima: dict[str, int]
    maxima: dict[str, int]
    first: int
    firsts: dict[str, int]
    sketches: Sequence[Sketch]

    def moments_of(self, value: str) -> Moments:
        return next(moments for moments in self.moments if moments.value == value)

    def sketch_of(self, feature: Feature) -> Sketch:
        wanted = (feature.aggregate, feature.value)
        return next(sketch for sketch in self.sketches if (sketch.aggregate, sketch.value) == wanted)


@dataclass(frozen=True, slots=True)
class Recent:
    """The latest `most` events of a source. columns: value -> column."""

    number: int
    source: int
    most: int
    columns: dict[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """schema_hash: changes whenever states of the old plan would mean something else.

    adds, bounds: the columns of a tile that add, and those of which the smallest counts.
    tile_words, recent_words: widths of their rows.
    """

    view: View
    sources: Sequence[Source]
    runs: Sequence[Run]
    recents: Sequence[Recent]
    adds: slice
    bounds: slice
    tile_words: int
    recent_words: int
    schema_hash: int

    @property
    def sketches(self) -> Sequence[Sketch]:
        """All of the view, by number."""
        return [sketch for run in self.runs for sketch in run.sketches]

    def source_number(self, name: str) -> int | None:
        return next((number for number, source in enumerate(self.sources) if source.name == name), None)

    def run_of(self, feature: Feature) -> Run:
        step_us = feature.step_us or ENDLESS_US
        return next(
            run for run in self.runs if run.step_us == step_us and self.sources[run.source].name == feature.source.name
        )

    def recent_of(self, feature: Feature) -> Recent:
        return next(recent for recent in self.recents if self.sources[recent.source].name == feature.source.name)

    def new_tile(self) -> np.ndarray:
        """A row of words: a tile that has seen nothing."""
        row = np.zeros(self.tile_words, np.int64)
        row[self.bounds] = np.array([np.inf]).view(np.int64)
        for first in {run.first for run in self.runs if run.first >= 0}:
            row[first : first + 2] = np.iinfo(np.int64).max
        return row


def steps_of(feature: Feature) -> int:
    """How many whole tiles before the newest one the feature's window reaches."""
    return feature.window_us // feature.step_us if feature.step_us else 1


def compiled(view: View) -> Plan:
    groups = _groups(view)
    # every run's columns of a kind begin at the same place, so that one slice holds them for all
    adds = slice(1, 1 + max((_added(features) for _, _, features in groups), default=0))
    bounds = slice(adds.stop, adds.stop + max((_bounded(features) for _, _, features in groups), default=0))
    runs: list[Run] = []
    sketches = 0
    width = bounds.stop
    for number, (source, step_us, features) in enumerate(groups):
        run, end = _run(number, source, step_us, features, bounds, sketches)
        runs.append(run)
        sketches += len(run.sketches)
        width = max(width, end)
    recents = _recents(view)
    recent_words = 2 + max((len(recent.columns) for recent in recents), default=0)
    plan = (view, view.sources, tuple(runs), tuple(recents), adds, bounds, width, recent_words)
    return Plan(*plan, schema_hash=_hash(view, runs, recents))


def _groups(view: View) -> list[tuple[int, int, list[Feature]]]:
    """Source number, step and features of each run."""
    groups: dict[tuple[int, int], list[Feature]] = {}
    for number, source in enumerate(view.sources):
        for feature in view.of(source):
            if not feature.aggregate.is_recent:
                groups.setdefault((number, feature.step_us or ENDLESS_US), []).append(feature)
    return [(*key, features) for key, features in sorted(groups.items())]


def _values(features: Iterable[Feature], *aggregates: Aggregate) -> list[str]:
    """Distinct, in order of first use."""
    return list(dict.fromkeys(f.value for f in features if f.aggregate in aggregates and f.value))


def _counts_events(features: Sequence[Feature]) -> bool:
    return any(f.aggregate is Aggregate.COUNT and not f.value for f in features)


def _added(features: Sequence[Feature]) -> int:
    kept = [_values(features, *_COUNTED), _values(features, *_SUMMED), _values(features, Aggregate.STD)]
    return sum(map(len, kept)) + _counts_events(features)


def _bounded(features: Sequence[Feature]) -> int:
    return len(_values(features, Aggregate.MIN)) + len(_values(features, Aggregate.MAX))


def _run(
    number: int, source: int, step_us: int, features: Sequence[Feature], bounds: slice, sketches: int
) -> tuple[Run, int]:
    """The run, and where its columns end. sketches: how many the runs before it have."""
    counted, summed = _values(features, *_COUNTED), _values(features, *_SUMMED)
    spread = _values(features, Aggregate.STD)
    at = 1
    moments = []
    for value in dict.fromkeys((*counted, *summed)):
        columns = []
        for kept in (counted, summed, spread):
            columns.append(at if value in kept else -1)
            at += value in kept
        moments.append(Moments(value, *columns))
    events = at if _counts_events(features) else -1
    at = bounds.start
    minima = {value: at + i for i, value in enumerate(_values(features, Aggregate.MIN))}
    at += len(minima)
    maxima = {value: at + i for i, value in enumerate(_values(features, Aggregate.MAX))}
    at = bounds.stop
    first_values = _values(features, Aggregate.FIRST)
    first = at if first_values else -1
    firsts = {value: at + 2 + i for i, value in enumerate(first_values)}
    at += 2 + len(firsts) if firsts else 0
    wanted = list(dict.fromkeys((f.aggregate, f.value) for f in features if f.aggregate in _SKETCHED))
    found = [Sketch(sketches + i, aggregate, value, at + i) for i, (aggregate, value) in enumerate(wanted)]
    steps = max(steps_of(feature) for feature in features)
    run = Run(number, source, step_us, steps, events, moments, minima, maxima, first, firsts, found)
    return run, at + len(found)


def _recents(view: View) -> list[Recent]:
    recents: list[Recent] = []
    for number, source in enumerate(view.sources):
        features = [feature for feature in view.of(source) if feature.aggregate.is_recent]
        if features:
            values = _values(features, Aggregate.LAST, Aggregate.LAST_N)
            most = max(int(feature.parameter) or 1 for feature in features)
            recents.append(Recent(len(recents), number, most, {value: 2 + i for i, value in enumerate(values)}))
    return recents


def _hash(view: View, runs: Sequence[Run], recents: Sequence[Recent]) -> int:
    """Of all that a state's words depend on. Neither defaults nor windows of the same step and reach are among it."""
    sources = [
        [s.name, s.known_us, s.sequence, s.where, [[value.name, value.expression] for value in s.made]]
        for s in view.sources
    ]
    kept = [repr(part) for part in (*runs, *recents)]
    text = json.dumps([LAYOUT, view.name, view.entity, sources, kept])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
