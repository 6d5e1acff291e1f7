"""What every feature means, in plain Python: one event after the other, nothing kept, nothing clever.

Batch SQL and the tile kernel are both held against this. It knows definitions, the grid of windows and nothing else of
the product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import md5

import numpy as np

from services.feature.define.definition import Aggregate, Feature, View
from services.feature.define.events import Events

Label = str | None
Number = float | None

_RECENT = (Aggregate.LAST, Aggregate.LAST_N, Aggregate.AGE_S)


@dataclass(frozen=True)
class Event:
    """One event of one source. entities, labels, values: by column, None for null; values as they are once made."""

    sequence: int
    known_us: int
    event_us: int
    entities: Mapping[str, Label]
    values: Mapping[str, Number] = field(default_factory=dict)
    labels: Mapping[str, Label] = field(default_factory=dict)

    def label(self, name: str) -> Label:
        return self.labels[name] if name in self.labels else self.entities[name]


def columns_of(source: str, events: Sequence[Event]) -> Events:
    """The same events as the product takes them."""
    first = events[0] if events else Event(0, 0, 0, {})

    def numbers(name: str) -> tuple[np.ndarray, np.ndarray]:
        given = [event.values[name] for event in events]
        values = np.array([0.0 if value is None else value for value in given], dtype=np.float64)
        return values, np.array([value is None for value in given], dtype=np.bool_)

    return Events(
        source,
        np.array([event.sequence for event in events], dtype=np.int64),
        np.array([event.event_us for event in events], dtype=np.int64),
        np.array([event.known_us for event in events], dtype=np.int64),
        {name: [event.entities[name] for event in events] for name in first.entities},
        {name: numbers(name) for name in first.values},
        {name: [event.labels[name] for event in events] for name in first.labels},
    )


def oracle(view: View, events: Mapping[str, Sequence[Event]], entity: str, as_of_us: int) -> list[float | None] | None:
    """The view's columns for one entity, None for null; None for a row of which nothing is known.

    events: by the name of their source, in any order; those that `where` leaves out are not among them.
    """
    mine = {
        source.name: sorted(
            (e for e in events.get(source.name, ()) if e.entities[view.entity] == entity and e.known_us < as_of_us),
            key=lambda e: (e.known_us, e.sequence),
        )
        for source in view.sources
    }
    if not any(mine.values()):
        return None
    found: list[float | None] = []
    for feature in view.features:
        found += _columns(feature, mine[feature.source.name], as_of_us)
    return found


def largest(view: View, events: Mapping[str, Sequence[Event]], feature: Feature) -> float:
    """The largest magnitude that a feature can have aggregated: what its tolerance is relative to."""
    values = [event.values.get(feature.value) for event in events.get(feature.source.name, ())]
    return max((abs(v) for v in values if v is not None and abs(v) <= 1e300), default=0.0)


def _columns(feature: Feature, known: list[Event], as_of_us: int) -> list[float | None]:
    if feature.aggregate in _RECENT:
        return _recent(feature, known, as_of_us)
    if feature.window:
        step_us, window_us = feature.step_us, feature.window_us
        lower_us = (as_of_us // step_us - window_us // step_us) * step_us
        known = [event for event in known if event.known_us >= lower_us]
    if feature.aggregate is Aggregate.DISTINCT:
        return [_distinct(_labels(feature, known))]
    if feature.aggregate is Aggregate.TOP_K:
        return _top(_labels(feature, known), int(feature.parameter))
    if feature.aggregate is Aggregate.FIRST:
        return [known[0].values[feature.value] if known else None]
    if not feature.value:
        return [float(len(known))]
    values = [event.values[feature.value] for event in known]
    return [_of_numbers(feature, [v for v in values if v is not None and -1e300 <= v <= 1e300])]


def _recent(feature: Feature, known: list[Event], as_of_us: int) -> list[float | None]:
    latest_first = known[::-1]
    if feature.aggregate is Aggregate.AGE_S:
        return [(as_of_us - latest_first[0].known_us) / 1e6 if latest_first else None]
    found: list[float | None] = []
    for nth in range(len(feature.columns)):
        event = latest_first[nth] if nth < len(latest_first) else None
        if event is None or (feature.window and event.known_us < as_of_us - feature.window_us):
            found.append(None)
        else:
            found.append(event.values[feature.value])
    return found


def _of_numbers(feature: Feature, values: list[float]) -> float | None:
    aggregate, n = feature.aggregate, len(values)
    if aggregate is Aggregate.COUNT:
        return float(n)
    if aggregate is Aggregate.SUM:
        return math.fsum(values)
    if not values:
        return None
    if aggregate is Aggregate.MIN:
        return min(values)
    if aggregate is Aggregate.MAX:
        return max(values)
    if aggregate is Aggregate.QUANTILE:
        return _quantile(values, feature.parameter)
    mean = math.fsum(value / n for value in values)
    if aggregate is Aggregate.MEAN:
        return mean
    assert aggregate is Aggregate.STD
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / n)


def _labels(feature: Feature, known: list[Event]) -> list[str]:
    return [label for event in known if (label := event.label(feature.value)) is not None]


def _distinct(labels: list[str]) -> float:
    registers = [0] * 4096
    for label in labels:
        digits = md5(label.encode()).hexdigest()
        register, rest = int(digits[:3], 16), format(int(digits[3:16], 16), "052b")
        rank = 53 if "1" not in rest else rest.index("1") + 1
        registers[register] = max(registers[register], rank)
    estimate = 0.7213 / (1 + 1.079 / 4096) * 4096**2 / math.fsum(2.0**-rank for rank in registers)
    empty = registers.count(0)
    if estimate <= 2.5 * 4096 and empty:
        return 4096 * math.log(4096 / empty)
    return estimate


def _top(labels: list[str], k: int) -> list[float | None]:
    counts = Counter(int(md5(label.encode()).hexdigest()[:6], 16) for label in labels)
    ranked = sorted(counts, key=lambda code: (-counts[code], code))
    return [float(ranked[nth]) if nth < len(ranked) else None for nth in range(k)]


def _quantile(values: list[float], q: float) -> float:
    gamma = 1.01 / 0.99
    buckets: Counter[int] = Counter()
    for value in values:
        if abs(value) < 1e-9:
            buckets[0] += 1
        else:
            index = 2048 + math.ceil(math.log(abs(value)) / math.log(gamma))
            buckets[index if value > 0 else -index] += 1
    rank, below = q * (len(values) - 1), 0
    for bucket in sorted(buckets):
        below += buckets[bucket]
        if below > rank:
            break
    size = 2 * gamma ** (abs(bucket) - 2048) / (gamma + 1)
    return 0.0 if bucket == 0 else math.copysign(size, bucket)
