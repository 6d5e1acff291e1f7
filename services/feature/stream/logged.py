"""Events of the log as columns, as kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import Source
from services.feature.define.events import Events, Numbers
from services.feature.stream.log import Logged


def events_of(source: Source, logged: Sequence[Logged]) -> Events:
    """What the source has of them. Columns that it has not are left out, and those that an event has not are null."""

    def times(of: Callable[[Logged], int]) -> NDArray[np.int64]:
        return np.fromiter(map(of, logged), np.int64, len(logged))

    return Events(
        source=source.name,
        sequence=times(lambda event: event.sequence),
        event_us=times(lambda event: event.event_us),
        known_us=times(lambda event: event.known_us),
        entities={name: [event.entities.get(name) for event in logged] for name in source.entities},
        values={name: _numbers(event.values.get(name) for event in logged) for name in source.plain},
        labels={name: [event.labels.get(name) for event in logged] for name in source.labels},
    )


def _numbers(values: Iterable[float | None]) -> Numbers:
    given: list[Any] = list(values)
    null = np.array([value is None for value in given], bool)
    return np.array([0.0 if value is None else value for value in given], np.float64), null
