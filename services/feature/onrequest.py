"""Features that are worked out while they are asked for: expressions over a request's inputs and its stored rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import INPUT
from services.feature.define.definitions import Definitions
from services.feature.define.events import Numbers
from services.feature.define.expression import Expression, Kind
from services.feature.define.schema import ViewSchema
from services.feature.online.packed import NULL, OK, Rows
from services.resilience.errors import BadInput, NotFound, Violation
from tenfold.feature.v1 import feature_pb2 as pb

_MOST_VIEWS = 256  # of one request
_MOST_VIOLATIONS = 8


class Stored(NamedTuple):
    """Rows of one view as they are answered: columns of the view, and what was found."""

    columns: Sequence[str]
    rows: Rows


@dataclass(frozen=True, slots=True)
class RequestLayout:
    """One request view, ready to be worked out.

    inputs: names of numbers that a request may carry. reads: the stored views whose columns the expressions speak of.
    """

    expressions: Sequence[Expression]
    inputs: Sequence[str]
    reads: Sequence[str]

    @classmethod
    def parse(cls, texts: Sequence[str], inputs: Sequence[str], stored: Mapping[str, Sequence[str]]) -> RequestLayout:
        """stored: the columns of the published views. Raises ExpressionError."""
        names = {f"{INPUT}.{name}": Kind.NUMBER for name in inputs}
        names |= {f"{view}.{column}": Kind.NUMBER for view, columns in stored.items() for column in columns}
        expressions = [Expression.parse(text, names, Kind.NUMBER) for text in texts]
        used = dict.fromkeys(name.partition(".")[0] for found in expressions for name in found.columns)
        return cls(expressions, inputs, [view for view in used if view != INPUT])

    def rows(self, inputs: Mapping[str, Sequence[float]], stored: Mapping[str, Stored], n: int) -> Rows:
        """Works out n rows from n numbers per input, null where it is left out, and n rows of each view it reads."""
        columns = {f"{INPUT}.{name}": _input(inputs.get(name), n) for name in self.inputs}
        for view in self.reads:
            columns |= _columns(view, stored[view], n)
        values = np.full((n, len(self.expressions)), np.nan, "<f4")
        status = np.full((n, len(self.expressions)), NULL, np.uint8)
        with np.errstate(over="ignore"):
            for at, expression in enumerate(self.expressions):
                found, null = expression.evaluate(columns)
                values[~null, at] = found[~null]
                status[~null, at] = OK
        event_us, age_s = _oldest([stored[view].rows for view in self.reads], n)
        return Rows(values.tobytes(), status.tobytes(), event_us.tobytes(), age_s.tobytes())


def _input(numbers: Sequence[float] | None, n: int) -> Numbers:
    if numbers is None:
        return np.zeros(n), np.ones(n, bool)
    return np.fromiter(numbers, np.float64, n), np.zeros(n, bool)


def _columns(view: str, stored: Stored, n: int) -> dict[str, Numbers]:
    """A value that is not OK is null, unless the view has a default for it."""
    shape = n, len(stored.columns)
    values = np.frombuffer(stored.rows.values, "<f4").reshape(shape).astype(np.float64)
    null = (np.frombuffer(stored.rows.status, np.uint8).reshape(shape) != OK) & np.isnan(values)
    return {f"{view}.{name}": (values[:, at], null[:, at]) for at, name in enumerate(stored.columns)}


def _oldest(rows: Sequence[Rows], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Up to when every row's events were counted, and its age; 0 and NaN where one is missing or none is read."""
    if not rows:
        return np.zeros(n, "<i8"), np.full(n, np.nan, "<f4")
    events = np.min([np.frombuffer(one.event_us, "<i8") for one in rows], axis=0)
    ages = np.max([np.frombuffer(one.age_s, "<f4") for one in rows], axis=0)
    return events.astype("<i8"), ages.astype("<f4")


@dataclass(frozen=True, slots=True)
class _Served:
    schema: ViewSchema
    layout: RequestLayout

    @property
    def row_bytes(self) -> int:
        """What one row adds to a GetFeaturesResponse."""
        return 5 * len(self.schema.columns) + 12


class RequestViews:
    """What the service needs of them: are a request's inputs right, and the rows."""

    def __init__(self, definitions: Definitions | None) -> None:
        self._views: dict[str, _Served] = {}
        if definitions is not None:
            stored = {view.name: view.columns for view in definitions.views}
            for view in definitions.request_views:
                layout = RequestLayout.parse([one.expression for one in view.features], view.inputs, stored)
                self._views[view.name] = _Served(ViewSchema(view.name, "", view.columns), layout)

    def check(self, request: pb.GetFeaturesRequest, max_rows: int) -> int:
        """How many bytes they add to the answer. Raises NotFound naming the view, or BadInput naming the field.

        max_rows: of each.
        """
        if len(request.request_views) > _MOST_VIEWS:
            told = f"must hold at most {_MOST_VIEWS} views, got {len(request.request_views)}"
            raise BadInput(Violation("request_views", told))
        lengths = {keys.view: len(keys.entity_ids) for keys in request.views}
        times = Counter(keys.view for keys in request.views)
        violations: list[Violation] = []
        size = 0
        for at, wanted in enumerate(request.request_views):
            if wanted.view not in self._views:
                there = ", ".join(self._views) or "none"
                raise NotFound(f"request view {wanted.view[:64]!r} is not defined; defined are: {there}")
            violations += self._violations(f"request_views[{at}]", wanted, lengths, times)
            n = self._rows(wanted, lengths)
            if n > max_rows:
                violations.append(Violation(f"request_views[{at}]", f"must be of at most {max_rows} rows, got {n}"))
            size += n * self._views[wanted.view].row_bytes
        if violations:
            raise BadInput(*violations[:_MOST_VIOLATIONS])
        return size

    def add(
        self,
        request: pb.GetFeaturesRequest,
        answer: pb.GetFeaturesResponse,
        columns: Mapping[str, Sequence[str]],
    ) -> None:
        """Adds the rows of every request view. columns: of each stored view, as they were answered.

        Raises NotFound where a view that was published lacks a column that is defined.
        """
        stored = {
            rows.view: Stored(columns[rows.view], Rows(rows.values, rows.status, rows.event_us, rows.age_s))
            for rows in answer.views
        }
        for wanted in request.request_views:
            served = self._views[wanted.view]
            for name in (name for expression in served.layout.expressions for name in expression.columns):
                view, _, column = name.partition(".")
                if view != INPUT and column not in stored[view].columns:
                    raise NotFound(f"request view {wanted.view!r} reads {name!r}, which is not published yet")
            n = self._rows(wanted, {keys.view: len(keys.entity_ids) for keys in request.views})
            inputs = {name: numbers.values[:] for name, numbers in wanted.inputs.items()}
            told = answer.views.add()
            told.view, told.columns = wanted.view, len(served.schema.columns)
            told.schema_hash = served.schema.schema_hash
            told.values, told.status, told.event_us, told.age_s = served.layout.rows(inputs, stored, n)[:4]

    def descriptions(self) -> list[pb.ViewDescription]:
        return [
            pb.ViewDescription(
                name=name,
                columns=served.schema.columns,
                schema_hash=served.schema.schema_hash,
                inputs=served.layout.inputs,
                reads=served.layout.reads,
            )
            for name, served in self._views.items()
        ]

    def _violations(
        self, field: str, wanted: pb.RequestViewInputs, lengths: Mapping[str, int], times: Mapping[str, int]
    ) -> Iterator[Violation]:
        """lengths, times: how many rows of each stored view are asked for, and how often it is."""
        layout = self._views[wanted.view].layout
        for view in layout.reads:
            if view not in lengths:
                yield Violation("views", f"must hold {view!r}, which request view {wanted.view!r} reads")
            elif times[view] > 1:  # which rows are meant?
                told = f"must hold {view!r} once, which request view {wanted.view!r} reads, got it {times[view]} times"
                yield Violation("views", told)
        n = self._rows(wanted, lengths)
        for view in layout.reads:
            if lengths.get(view, n) != n:
                yield Violation(field, f"must read views with the same number of rows, {n}, got {lengths[view]}")
        for name, numbers in wanted.inputs.items():
            if name not in layout.inputs:
                allowed = ", ".join(layout.inputs) or "none"
                yield Violation(f"{field}.inputs", f"must be of {allowed}, got {name[:64]!r}")
            elif len(numbers.values) != n:
                yield Violation(f"{field}.inputs[{name}]", f"must hold {n} numbers, got {len(numbers.values)}")

    def _rows(self, wanted: pb.RequestViewInputs, lengths: Mapping[str, int]) -> int:
        """How many rows are asked for: those of the views it reads, or of its inputs where it reads none."""
        reads = self._views[wanted.view].layout.reads
        of_views = [lengths[view] for view in reads if view in lengths]
        return next(iter(of_views or [len(numbers.values) for numbers in wanted.inputs.values()]), 0)
