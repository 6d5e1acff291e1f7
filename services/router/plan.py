"""How a tier's input row is put together: which stored features go where, and what the request adds.

A plan is made once per version of a tier's model and schema of its views; a request then costs a few array
operations, however many columns there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.mesh.columns import IsText, Number, RequestColumns, Stored, parse_column
from services.mesh.meshfile import Model, Tier
from services.mesh.query import MOST_VIOLATIONS, Query
from services.resilience.errors import BadInput, Violation

Floats = NDArray[np.float32]
Places = NDArray[np.intp]


class PlanError(ValueError):
    """A tier's model reads something that does not exist."""


@dataclass(frozen=True, slots=True)
class ViewShape:
    """A feature view as the feature service describes it.

    entity: whose id is the key; empty for a view that is worked out on request, from the request's `inputs` and the
    rows of the stored views that it `reads`.
    """

    name: str
    entity: str
    columns: tuple[str, ...]
    schema_hash: int
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def on_request(self) -> bool:
        return not self.entity


@dataclass(frozen=True, slots=True, eq=False)
class TierPlan:
    """How one version of a tier's model is fed.

    version: of the model in the inference repository, empty where the repository names none.
    provider: the execution provider that runs it.
    views: those it reads, in the order in which their answers are joined: stored ones, then those on request.
    places: where stored values are in the joined answers. target: which column of the model's input each becomes.
    firsts: where each view's first column is in the joined answers.
    blank: float32 (columns,), the row to start from.
    """

    tier: Tier
    version: str
    provider: str
    names: tuple[str, ...]
    views: tuple[ViewShape, ...]
    places: Joined
    target: Places
    firsts: Joined
    blank: Floats
    request: RequestColumns

    @property
    def on_request(self) -> tuple[ViewShape, ...]:
        """Views that are worked out on request."""
        return tuple(view for view in self.views if view.on_request)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for plans that do the same."""
        return self.tier, self.version, self.provider, self.names, self.views

    def rows(self, count: int, values: Floats, places: Places) -> Floats:
        """Model input (count, columns) from the joined answers of the views; places: of `self.places.of(count)`."""
        rows = np.empty((count, len(self.blank)), np.float32)
        rows[:] = self.blank
        rows[:, self.target] = values.take(places)
        return rows

    def complete(self, row: Floats, query: Query) -> None:
        """Writes what the request itself says into its row."""
        self.request.fill(row, query.entities, query.numbers, query.texts)


@dataclass(frozen=True, slots=True)
class Joined:
    """Where values are when the answers of several views, each (count, columns) row-major, are joined end to end.

    Joining bytes costs one copy for all views; putting arrays side by side would cost several operations a view.

    before: columns of the views joined before a value's own. width: columns of its own view. at: its column there.
    """

    before: Places
    width: Places
    at: Places

    def of(self, count: int) -> Places:
        """Places (count, values) of the values of `count` rows."""
        first = self.before * count + self.at
        return first[np.newaxis] if count == 1 else first + np.arange(count)[:, np.newaxis] * self.width


def make_plan(
    tier: Tier, version: str, provider: str, names: Sequence[str], views: Mapping[str, ViewShape]
) -> TierPlan:
    """Raises PlanError naming the column or view that does not exist."""
    try:
        columns = [parse_column(name) for name in names]
        request = RequestColumns(columns)
    except ValueError as error:
        raise PlanError(f"model {tier.model!r}: {error}") from error
    read: dict[str, ViewShape] = {}
    sources: list[tuple[str, int]] = []
    target = []
    for at, column in enumerate(columns):
        if not isinstance(column, Stored):
            continue
        view = views.get(column.view)
        if view is None:
            raise PlanError(f"model {tier.model!r} reads view {column.view!r}; there are {', '.join(sorted(views))}")
        if column.column not in view.columns:
            raise PlanError(f"model {tier.model!r} reads {column.view}.{column.column}; the view has no such column")
        for name in view.reads:
            if name not in views:
                raise PlanError(f"view {view.name!r} reads view {name!r}; there are {', '.join(sorted(views))}")
            read[name] = views[name]
        read[view.name] = view
        sources.append((view.name, view.columns.index(column.column)))
        target.append(at)
    read = dict(sorted(read.items(), key=lambda item: item[1].on_request))  # the order in which they are answered
    return TierPlan(
        tier=tier,
        version=version,
        provider=provider,
        names=tuple(names),
        views=tuple(read.values()),
        places=_joined(read, sources),
        target=np.array(target, np.intp),
        firsts=_joined(read, [(name, 0) for name in read]),
        blank=np.array(request.blank, np.float32),
        request=request,
    )


def _joined(views: Mapping[str, ViewShape], sources: Sequence[tuple[str, int]]) -> Joined:
    """Where the columns `sources`, each a view's name and a place in it, are when `views` are joined in order."""
    widths = [len(view.columns) for view in views.values()]
    before = dict(zip(views, np.cumsum([0, *widths]), strict=False))
    return Joined(
        np.array([before[name] for name, _ in sources], np.intp),
        np.array([len(views[name].columns) for name, _ in sources], np.intp),
        np.array([at for _, at in sources], np.intp),
    )


class ModelPlan:
    """The plans of a model's tiers that can be served now."""

    def __init__(self, model: Model, tiers: Mapping[str, TierPlan]) -> None:
        """tiers: tier name -> its plan."""
        self.model = model
        self.tiers = tiers
        views = [view for plan in tiers.values() for view in plan.views]
        self._views = {view.name: view.entity for view in views if not view.on_request}
        columns = [parse_column(name) for plan in tiers.values() for name in plan.names]
        numbers = {column.name for column in columns if isinstance(column, Number)}
        numbers |= {name for view in views for name in view.inputs}
        texts = {column.name for column in columns if isinstance(column, IsText)}
        self._only_numbers, self._only_texts = numbers - texts, texts - numbers
        self._entities = frozenset(self._views.values())

    def check(self, query: Query) -> None:
        """Raises BadInput where an entity is missing or an input is of the wrong kind.

        Every view of the model counts, not only those of the tier that will answer: whether a request is valid must
        not depend on load.
        """
        if (
            self._entities <= query.entities.keys()
            and self._only_numbers.isdisjoint(query.texts)
            and self._only_texts.isdisjoint(query.numbers)
        ):
            return
        wrong = [
            Violation(
                f"entities[{entity}]", f"must be given: view {view!r} of model {self.model.name!r} is keyed by it"
            )
            for view, entity in self._views.items()
            if entity not in query.entities
        ]
        wrong += [
            Violation(f"inputs[{name}]", f"must be a number, got text {query.texts[name][:40]!r}")
            for name in sorted(self._only_numbers.intersection(query.texts))
        ]
        wrong += [
            Violation(f"inputs[{name}]", f"must be a text, got number {query.numbers[name]}")
            for name in sorted(self._only_texts.intersection(query.numbers))
        ]
        raise BadInput(*wrong[:MOST_VIOLATIONS])
