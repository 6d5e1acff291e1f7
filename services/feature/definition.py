"""What a feature is, declared once: training, materialisation and replay all compute it from this.

    ARRIVALS = Source("arrivals", "flights/*.parquet", event_us="arrived_us", known_us="arrived_us",
                      sequence="flight_id", entities=("origin",), values=("delay",))
    ORIGIN = View("origin", "origin", (*windowed(ARRIVALS, "delay", (COUNT, MEAN), ("1h", "24h")),
                                       *latest(ARRIVALS, "delay")), ttl_s=86_400)

A definition says nothing of how it is computed. `services.feature.sql` compiles it to SQL; a second compiler needs
to know only `View.features`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.feature.schema import ViewSchema

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([smhd])")
_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}


class DefinitionError(ValueError):
    """A source, feature or view that cannot mean anything; the message names the view and the column."""


class Aggregate(enum.StrEnum):
    """How many values become one. Nulls and values that are not finite take no part, except in LAST.

    Over a window:  COUNT of values; MEAN; STD, of the population (0 for a single value).
    Over all time:  LAST, the value of the latest event, null where that event had none; AGE_S, seconds since it.
    """

    COUNT = "count"
    MEAN = "mean"
    STD = "std"
    LAST = "last"
    AGE_S = "age_s"

    @property
    def needs_window(self) -> bool:
        return self in (Aggregate.COUNT, Aggregate.MEAN, Aggregate.STD)


def window_us(window: str) -> int:
    """Length of a window in microseconds: a whole number and s, m, h or d, as in "90s", "24h" or "7d"."""
    if not (match := _WINDOW.fullmatch(window)):
        raise DefinitionError(f"a window must be 1 to 9999 followed by s, m, h or d, got {window!r}")
    return int(match[1]) * _UNIT_US[match[2]]


@dataclass(frozen=True, slots=True)
class Source:
    """Events at rest.

    path: Parquet files below the offline folder, a glob.
    event_us, known_us: int64 columns, microseconds since 1970 UTC: when it happened, and when that became known. A
    feature counts an event from the moment after it was known.
    sequence: int64 column, unique; says which of the events known in the same microsecond came later.
    entities: string columns that views may be about. values: number columns that features may aggregate.
    """

    name: str
    path: str
    event_us: str
    known_us: str
    sequence: str
    entities: Sequence[str]
    values: Sequence[str]

    def __post_init__(self) -> None:
        columns = [self.event_us, self.known_us, self.sequence, *self.entities, *self.values]
        for name in (self.name, *columns):
            if not _NAME.fullmatch(name):
                raise DefinitionError(f"source {self.name!r}: a name must match {_NAME.pattern}, got {name!r}")
        if not self.path or "'" in self.path:
            raise DefinitionError(f"source {self.name!r}: path must be a glob without quotes, got {self.path!r}")


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of a view.

    value: the source's column that is aggregated; empty for the events themselves, which have a COUNT and an AGE_S.
    window: how far back, empty for all time. An event counts where as_of - window <= known_us < as_of.
    """

    source: Source
    aggregate: Aggregate
    value: str = ""
    window: str = ""

    @property
    def name(self) -> str:
        """As it is stored: "delay_mean_24h", "delay_last", "arrivals_count_1h", "arrivals_age_s"."""
        return "_".join(part for part in (self.value or self.source.name, self.aggregate.value, self.window) if part)


def windowed(
    source: Source, value: str, aggregates: Sequence[Aggregate], windows: Sequence[str]
) -> tuple[Feature, ...]:
    """Every aggregate over every window. value: a column of `source`, or empty to COUNT its events."""
    return tuple(Feature(source, aggregate, value, window) for window in windows for aggregate in aggregates)


def latest(source: Source, *values: str) -> tuple[Feature, ...]:
    """The latest event's values, and how long ago it became known."""
    return (*(Feature(source, Aggregate.LAST, value) for value in values), Feature(source, Aggregate.AGE_S))


@dataclass(frozen=True, slots=True)
class View:
    """Features of one entity, stored and read together.

    entity: a column of every source the features read; its value is the key.
    ttl_s: age in seconds at which a stored row expires; 0 for never.
    """

    name: str
    entity: str
    features: Sequence[Feature]
    ttl_s: float = 0.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DefinitionError(f"view {self.name!r}: its name must match {_NAME.pattern}")
        if not self.ttl_s >= 0:
            raise DefinitionError(f"view {self.name!r}: ttl_s must be at least 0, got {self.ttl_s}")
        if not self.features:
            raise DefinitionError(f"view {self.name!r}: must have at least 1 feature, got 0")
        seen: set[str] = set()
        for feature in self.features:
            if problem := self._problem(feature, seen):
                raise DefinitionError(f"view {self.name!r}, column {feature.name!r}: {problem}")
            seen.add(feature.name)

    def _problem(self, feature: Feature, seen: set[str]) -> str:
        source, aggregate = feature.source, feature.aggregate
        if self.entity not in source.entities:
            allowed = ", ".join(source.entities)
            return f"source {source.name!r} has no entity {self.entity!r}, allowed: {allowed}"
        if feature.value and feature.value not in source.values:
            allowed = ", ".join(source.values)
            return f"source {source.name!r} has no value {feature.value!r}, allowed: {allowed}"
        if not feature.value and aggregate not in (Aggregate.COUNT, Aggregate.AGE_S):
            return f"{aggregate} needs a value; only count and age_s are of events"
        if feature.value and aggregate is Aggregate.AGE_S:
            return f"age_s is of events, not of a value, got {feature.value!r}"
        if aggregate.needs_window != bool(feature.window):
            return f"{aggregate} must {'have a' if aggregate.needs_window else 'not have a'} window"
        if feature.window:
            try:
                window_us(feature.window)
            except DefinitionError as error:
                return str(error)
        if any(other.source != source for other in self.features if other.source.name == source.name):
            return f"another source is also named {source.name!r}"
        return "it is there twice" if feature.name in seen else ""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source the features read, in the order of their first use."""
        return tuple({feature.source.name: feature.source for feature in self.features}.values())

    def schema(self) -> ViewSchema:
        """The view as the online store knows it."""
        return ViewSchema(self.name, self.entity, self.columns, self.ttl_s)
