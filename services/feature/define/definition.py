"""What a feature is, declared once: training, materialisation, streams and requests all compute it from this.

    ARRIVALS = Source("arrivals", "flights/*.parquet", event_us="arrived_us", known_us="arrived_us",
                      sequence="flight_id", entities=("origin",),
                      values=("delay", Value("late", "delay >= 15")), labels=("dest",))
    ORIGIN = View("origin", "origin", (*windowed(ARRIVALS, "delay", (COUNT, MEAN), ("1h", "24h")),
                                       *latest(ARRIVALS, "delay"), quantile(ARRIVALS, "delay", 0.9, "24h")),
                  ttl_s=86_400)
    CONNECTION = RequestView("connection", inputs=("turnaround_min",),
                             features=(Value("slack", "input.turnaround_min - origin.delay_mean_1h"),))

A definition says nothing of how it is computed. `services.feature.offline.sql` compiles it to SQL and
`services.feature.tiles.kernel` to tiles; both know only `View.features`.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.feature.define.expression import Expression, ExpressionError, Kind
from services.feature.define.schema import ViewSchema
from services.feature.define.windows import WindowError, length_us, resolution_us

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
MOST_LAST = 64
INPUT = "input"  # what a request carries, in the expressions of request views
MOST_TOP = 16


class DefinitionError(ValueError):
    """A source, feature or view that cannot mean anything; the message names the view and the column."""


class Aggregate(enum.StrEnum):
    """How many values become one. What is aggregated is every event in the window, or ever where there is none.

    Of values that are finite and not null:  COUNT, SUM, MEAN, MIN, MAX; STD, of the population (0 for one value);
    QUANTILE, from a sketch, within 1 % of the value.
    Of the events' values as they are, null and NaN included:  FIRST, LAST, LAST_N (1 is the latest). Their order is
    known time, then sequence.
    Of labels:  DISTINCT, an estimate, within about 2 %; TOP_K, the codes of the most frequent, 1 the most.
    Of events:  COUNT without a value; AGE_S, seconds since the latest became known.

    Of nothing: COUNT, SUM and DISTINCT are 0, all others null. LAST, LAST_N and AGE_S look back exactly; all others
    to the step before their window: see services/feature/define/windows.py.
    """

    COUNT = "count"
    SUM = "sum"
    MEAN = "mean"
    STD = "std"
    MIN = "min"
    MAX = "max"
    FIRST = "first"
    LAST = "last"
    LAST_N = "last_n"
    DISTINCT = "distinct"
    TOP_K = "top"
    QUANTILE = "p"
    AGE_S = "age_s"

    @property
    def of_labels(self) -> bool:
        return self in (Aggregate.DISTINCT, Aggregate.TOP_K)

    @property
    def is_recent(self) -> bool:
        """It needs only the latest events, so that its window can be exact."""
        return self in (Aggregate.LAST, Aggregate.LAST_N, Aggregate.AGE_S)


@dataclass(frozen=True, slots=True)
class Value:
    """A number made of others: a row expression, see services/feature/define/expression.py."""

    name: str
    expression: str


@dataclass(frozen=True, slots=True)
class Source:
    """Events, at rest or in a stream.

    path: Parquet files below the offline folder, a glob.
    event_us, known_us: int64 columns, microseconds since 1970 UTC: when it happened, and when that became known. A
    feature counts an event from the moment after it was known.
    sequence: int64 column, unique; says which of the events known in the same microsecond came later.
    entities: string columns that views may be about.
    values: number columns that features may aggregate, and numbers made of values, labels and entities.
    labels: string columns that features may count or list; entities are labels too.
    where: a row expression; events for which it is not true do not count.
    """

    name: str
    path: str
    event_us: str
    known_us: str
    sequence: str
    entities: Sequence[str]
    values: Sequence[str | Value] = ()
    labels: Sequence[str] = ()
    where: str = ""

    def __post_init__(self) -> None:
        for what in ("entities", "values", "labels"):
            if isinstance(given := getattr(self, what), str):  # ("driver") is no tuple
                raise DefinitionError(f"source {self.name!r}: {what} must be a tuple of names, got {given!r}")
        for name in (self.name, self.event_us, self.known_us, self.sequence, *self.names):
            if not _NAME.fullmatch(name):
                raise DefinitionError(f"source {self.name!r}: a name must match {_NAME.pattern}, got {name!r}")
        twice = [name for at, name in enumerate(self.names) if name in self.names[:at]]
        if twice:
            raise DefinitionError(f"source {self.name!r}: column {twice[0]!r} is there twice")
        if not self.entities:
            raise DefinitionError(f"source {self.name!r}: must have at least 1 entity, got 0")
        if not self.path or "'" in self.path:
            raise DefinitionError(f"source {self.name!r}: path must be a glob without quotes, got {self.path!r}")
        for value in self.made:
            self.expression(value)
        self.condition()

    @property
    def names(self) -> tuple[str, ...]:
        """Entities, then labels, then values."""
        return (*self.entities, *self.labels, *self.value_names)

    @property
    def value_names(self) -> tuple[str, ...]:
        return tuple(value if isinstance(value, str) else value.name for value in self.values)

    @property
    def plain(self) -> tuple[str, ...]:
        """Values that events carry."""
        return tuple(value for value in self.values if isinstance(value, str))

    @property
    def made(self) -> tuple[Value, ...]:
        """Values that are made of others."""
        return tuple(value for value in self.values if isinstance(value, Value))

    @property
    def columns(self) -> dict[str, Kind]:
        """What a row expression may speak of."""
        texts = dict.fromkeys((*self.entities, *self.labels), Kind.TEXT)
        numbers = dict.fromkeys((*self.plain, self.event_us, self.known_us), Kind.NUMBER)
        return texts | numbers

    def expression(self, value: Value) -> Expression:
        """Checked. Raises DefinitionError."""
        return self._parsed(value.expression, f"value {value.name!r}", Kind.NUMBER)

    def condition(self) -> Expression | None:
        """`where`, checked. Raises DefinitionError."""
        return self._parsed(self.where, "where", Kind.TRUTH) if self.where else None

    def _parsed(self, text: str, what: str, kind: Kind) -> Expression:
        try:
            return Expression.parse(text, self.columns, kind)
        except ExpressionError as error:
            raise DefinitionError(f"source {self.name!r}, {what}: {error}") from None


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of a view, or several where the aggregate is a list.

    value: the source's value or label that is aggregated; empty for the events themselves, which have COUNT and AGE_S.
    window: how far back, empty for all time. resolution: the step of its far end, empty for the usual one.
    parameter: n of LAST_N, k of TOP_K, or the quantile, from 0 to 1.
    default: what readers get where the feature is null or its row is missing; None for NaN.
    """

    source: Source
    aggregate: Aggregate
    value: str = ""
    window: str = ""
    resolution: str = ""
    parameter: float = 0.0
    default: float | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """As they are stored: "delay_mean_24h", "delay_last", "arrivals_count_1h", "delay_p90_7d", "dest_top_1"."""
        if self.aggregate is Aggregate.LAST_N:
            return tuple(self._column(f"last_{n}") for n in range(1, int(self.parameter) + 1))
        if self.aggregate is Aggregate.TOP_K:
            return tuple(self._column(f"top_{n}") for n in range(1, int(self.parameter) + 1))
        if self.aggregate is Aggregate.QUANTILE:
            return (self._column(f"p{self.parameter * 100:g}".replace(".", "_")),)
        return (self._column(self.aggregate.value),)

    @property
    def name(self) -> str:
        """The first of its columns."""
        return self.columns[0]

    @property
    def window_us(self) -> int:
        """0 for all time."""
        return length_us(self.window) if self.window else 0

    @property
    def step_us(self) -> int:
        """The step of the window's far end, microseconds; 0 where it is exact or there is none."""
        return 0 if self.aggregate.is_recent or not self.window else resolution_us(self.window, self.resolution)

    def _column(self, what: str) -> str:
        return "_".join(part for part in (self.value or self.source.name, what, self.window) if part)


def windowed(
    source: Source, value: str, aggregates: Sequence[Aggregate], windows: Sequence[str], default: float | None = None
) -> tuple[Feature, ...]:
    """Every aggregate over every window. value: a value or label of `source`, or empty to COUNT its events."""
    return tuple(
        Feature(source, aggregate, value, window, default=default) for window in windows for aggregate in aggregates
    )


def latest(source: Source, *values: str, window: str = "") -> tuple[Feature, ...]:
    """The latest event's values, null where it is older than the window, and how long ago it became known."""
    lasts = (Feature(source, Aggregate.LAST, value, window) for value in values)
    return (*lasts, Feature(source, Aggregate.AGE_S))


def last_n(source: Source, value: str, n: int, window: str = "") -> Feature:
    """The values of the n latest events, the latest first."""
    return Feature(source, Aggregate.LAST_N, value, window, parameter=n)


def top_k(source: Source, label: str, k: int, window: str = "") -> Feature:
    """The codes of the k most frequent labels, the most frequent first: see services/feature/define/sketches.py."""
    return Feature(source, Aggregate.TOP_K, label, window, parameter=k)


def quantile(source: Source, value: str, q: float, window: str = "") -> Feature:
    """The value that a share `q` of the values do not exceed, within 1 % of it."""
    return Feature(source, Aggregate.QUANTILE, value, window, parameter=q)


@dataclass(frozen=True, slots=True)
class View:
    """Features of one entity, stored and read together.

    entity: a column of every source the features read; its value is the key.
    ttl_s: age in seconds at which a stored row expires; 0 for never.
    stream: its rows are kept up to date by events as they are written, and windows end at the moment of reading.
    """

    name: str
    entity: str
    features: Sequence[Feature]
    ttl_s: float = 0.0
    stream: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DefinitionError(f"view {self.name!r}: its name must match {_NAME.pattern}")
        if not self.ttl_s >= 0:
            raise DefinitionError(f"view {self.name!r}: ttl_s must be at least 0, got {self.ttl_s}")
        if not self.features:
            raise DefinitionError(f"view {self.name!r}: must have at least 1 feature, got 0")
        seen: set[str] = set()
        for feature in self.features:
            problem = _problem(feature, self.entity)
            if not problem and any(
                other.source != feature.source for other in self.features if other.source.name == feature.source.name
            ):
                problem = f"another source is also named {feature.source.name!r}"
            if not problem and not seen.isdisjoint(feature.columns):
                problem = "it is there twice"
            if problem:
                name = (
                    feature.name if isinstance(feature.window, str) and _has_valid_parameter(feature) else feature.value
                )
                raise DefinitionError(f"view {self.name!r}, column {name!r}: {problem}")
            seen.update(feature.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for feature in self.features for column in feature.columns)

    @property
    def defaults(self) -> tuple[float | None, ...]:
        """One per column."""
        return tuple(feature.default for feature in self.features for _ in feature.columns)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source the features read, in the order of their first use."""
        return tuple({feature.source.name: feature.source for feature in self.features}.values())

    def of(self, source: Source) -> tuple[Feature, ...]:
        """The features that read `source`."""
        return tuple(feature for feature in self.features if feature.source.name == source.name)

    def schema(self) -> ViewSchema:
        """The view as the online store knows it."""
        return ViewSchema(self.name, self.entity, self.columns, self.ttl_s, self.defaults, self.fingerprint())

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever the view's meaning may have: by name, source or expression."""
        text = json.dumps([self.name, self.entity, self.ttl_s, self.stream, [_facts(f) for f in self.features]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RequestView:
    """Features that are worked out when they are asked for, from what the request carries and stored features.

    inputs: names of numbers that the request carries. features: expressions over "input.<name>" and "<view>.<column>".
    """

    name: str
    inputs: Sequence[str]
    features: Sequence[Value]

    def __post_init__(self) -> None:
        for name in (self.name, *self.inputs, *self.columns):
            if not _NAME.fullmatch(name):
                raise DefinitionError(f"request view {self.name!r}: a name must match {_NAME.pattern}, got {name!r}")
        if not self.features:
            raise DefinitionError(f"request view {self.name!r}: must have at least 1 feature, got 0")
        if len(set(self.columns)) != len(self.columns):
            raise DefinitionError(f"request view {self.name!r}: a column is there twice: {list(self.columns)}")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    def expressions(self, views: Sequence[View]) -> list[Expression]:
        """One per feature, checked against the stored views. Raises DefinitionError."""
        columns = {f"{INPUT}.{name}": Kind.NUMBER for name in self.inputs}
        columns |= {f"{view.name}.{column}": Kind.NUMBER for view in views for column in view.columns}
        found = []
        for feature in self.features:
            try:
                found.append(Expression.parse(feature.expression, columns, Kind.NUMBER))
            except ExpressionError as error:
                raise DefinitionError(f"request view {self.name!r}, column {feature.name!r}: {error}") from None
        return found


def _problem(feature: Feature, entity: str) -> str:
    return next((problem for problem in _problems(feature, entity) if problem), "")


def _problems(feature: Feature, entity: str) -> Iterator[str]:
    source, aggregate, value = feature.source, feature.aggregate, feature.value
    if not isinstance(aggregate, Aggregate):
        allowed = ", ".join(one.name for one in Aggregate)
        yield f"an aggregate must be of Aggregate, got {aggregate!r}, allowed: {allowed}"
        return
    if entity not in source.entities:
        yield f"source {source.name!r} has no entity {entity!r}, allowed: {', '.join(source.entities)}"
    labels = (*source.labels, *source.entities)
    if value and aggregate.of_labels and value not in labels:
        yield f"source {source.name!r} has no label {value!r}, allowed: {', '.join(labels)}"
    if value and not aggregate.of_labels and aggregate is not Aggregate.AGE_S and value not in source.value_names:
        yield f"source {source.name!r} has no value {value!r}, allowed: {', '.join(source.value_names)}"
    if not value and aggregate not in (Aggregate.COUNT, Aggregate.AGE_S):
        yield f"{aggregate} needs a value; only count and age_s are of events"
    if aggregate is Aggregate.AGE_S and (value or feature.window):
        yield f"age_s is of events, and of all time, got {value or feature.window!r}"
    if not _has_valid_parameter(feature):
        yield _PARAMETERS.get(aggregate, f"{aggregate} takes no parameter") + f", got {feature.parameter:g}"
    if feature.resolution and (aggregate.is_recent or not feature.window):
        yield f"{aggregate} without steps takes no resolution, got {feature.resolution!r}"
    try:
        _ = feature.window_us, feature.step_us
    except WindowError as error:
        yield str(error)


_PARAMETERS = {
    Aggregate.LAST_N: f"last_n needs a whole parameter from 1 to {MOST_LAST}",
    Aggregate.TOP_K: f"top needs a whole parameter from 1 to {MOST_TOP}",
    Aggregate.QUANTILE: "a quantile needs a parameter from 0 to 1",
}


def _has_valid_parameter(feature: Feature) -> bool:
    given = feature.parameter
    if not isinstance(feature.aggregate, Aggregate):
        return False  # and no name of it can be made
    if feature.aggregate is Aggregate.LAST_N:
        return given in range(1, MOST_LAST + 1)
    if feature.aggregate is Aggregate.TOP_K:
        return given in range(1, MOST_TOP + 1)
    return 0 <= given <= 1 if feature.aggregate is Aggregate.QUANTILE else given == 0


def _facts(feature: Feature) -> list[object]:
    source = feature.source
    values = [value if isinstance(value, str) else [value.name, value.expression] for value in source.values]
    return [
        [source.name, source.path, source.event_us, source.known_us, source.sequence, source.where, values],
        [feature.aggregate, feature.value, feature.window, feature.step_us, feature.parameter, feature.default],
    ]
