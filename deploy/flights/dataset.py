"""The point-in-time training set: every flight as it looked two hours before its departure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
from numpy.typing import NDArray

from deploy.flights.data import INPUTS
from deploy.flights.views import VIEWS
from services.feature.define.definition import View
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online.materialize import Rows

ORIGINS = ("EWR", "JFK", "LGA")
CARRIERS = ("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL", "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV")
REQUEST_COLUMNS = (*(f"input.{name}" for name in INPUTS), *(f"entity.origin={origin}" for origin in ORIGINS))
FALLBACK_COLUMNS = (*REQUEST_COLUMNS, *(f"entity.carrier={carrier}" for carrier in CARRIERS))
STORED_COLUMNS = tuple(f"{view.name}.{column}" for view in VIEWS for column in view.columns)


def _midnight_us(month: int, day: int, utc_hour: int) -> int:
    return int(datetime(2013, month, day, utc_hour, tzinfo=UTC).timestamp()) * 1_000_000


# midnight in New York; the first four weeks only fill the longest windows
TRAIN_FROM_US = _midnight_us(1, 29, 5)
VALIDATE_FROM_US = _midnight_us(10, 1, 4)
TEST_FROM_US = _midnight_us(11, 1, 4)
BASE_MOMENT_US = _midnight_us(11, 1, 0)
"""2013-11-01 00:00 UTC, before the first held-out prediction: what the online store starts with is as of it."""

Progress = Callable[[float], None]
"""Told the share that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """n flights in the order of their ids.

    flights: what `deploy.flights.data` wrote. rows: view name -> float32 (n, columns), NaN for null.
    base: every entity's row of every view as of BASE_MOMENT_US. known: view name -> bool (n,), False where nothing was
    known of the flight's entity.
    """

    flights: pa.Table
    rows: Mapping[str, NDArray[np.float32]]
    base: Sequence[Rows] = ()
    known: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def late(self) -> NDArray[np.int64]:
        """The label: 0 or 1, (n,)."""
        return self.numbers("late").astype(np.int64)

    def numbers(self, column: str) -> NDArray[np.float64]:
        return np.asarray(self.flights[column].to_numpy(), dtype=np.float64)

    def values(self, columns: Sequence[str], where: NDArray[np.bool_]) -> NDArray[np.float32]:
        """float32 (flights where True, columns), as the router gathers them for a model's "tenfold.columns"."""
        out = np.empty((int(where.sum()), len(columns)), dtype=np.float32)
        for number, column in enumerate(columns):
            out[:, number] = self._value(column)[where]
        return out

    def training(self) -> NDArray[np.bool_]:
        """January to September, without flights that no aircraft was ever recorded for.

        All of those were cancelled, and nobody knew two hours before: learning from them would be a leak.
        """
        return self._between(TRAIN_FROM_US, VALIDATE_FROM_US) & self._has_aircraft()

    def validation(self) -> NDArray[np.bool_]:
        return self._between(VALIDATE_FROM_US, TEST_FROM_US) & self._has_aircraft()

    def test(self) -> NDArray[np.bool_]:
        """November and December, every flight."""
        return self._between(TEST_FROM_US, 2**62)

    def _between(self, begin_us: int, end_us: int) -> NDArray[np.bool_]:
        departs_us = self.flights["departs_us"].to_numpy()
        return np.asarray((departs_us >= begin_us) & (departs_us < end_us))

    def _has_aircraft(self) -> NDArray[np.bool_]:
        return np.asarray(self.flights["tailnum"].is_valid().to_numpy())

    def _value(self, column: str) -> NDArray[np.float32]:
        kind, _, name = column.partition(".")
        if kind == "input":
            return self.numbers(name).astype(np.float32)
        if kind == "entity":
            entity, _, wanted = name.partition("=")
            return np.asarray(pa.compute.equal(self.flights[entity], wanted).to_numpy(), dtype=np.float32)
        view = next(view for view in VIEWS if view.name == kind)
        return self.rows[kind][:, view.columns.index(name)]


def read_flights(offline: Path) -> pa.Table:
    """Every flight, in the order of their ids."""
    files = sorted(str(path) for path in (offline / "flights").glob("*.parquet"))
    return pa.dataset.dataset(files).to_table().combine_chunks().sort_by("flight_id")


def build(offline: Path, progress: Progress = lambda _: None) -> Dataset:
    """Computes every view for every flight, and for every entity at the base moment, from the files in `offline`."""
    flights, store = read_flights(offline), OfflineStore(offline)
    n, rows, base, known = len(flights), {}, [], {}
    for done, view in enumerate(VIEWS, start=1):
        ids = store.entity_ids(view, BASE_MOMENT_US)
        computed = store.compute(view, _spine(flights, view, ids))
        values = computed.float32()
        rows[view.name], known[view.name] = values[:n], computed.known[:n]
        base.append(Rows(view.schema(), ids, BASE_MOMENT_US, values[n:]))
        progress(done / len(VIEWS))
    return Dataset(flights, rows, base, known)


def _spine(flights: pa.Table, view: View, ids: Sequence[str]) -> Spine:
    """The view's entity of every flight at the moment of its prediction, then every entity at the base moment."""
    entities = pa.concat_arrays([flights[view.entity].combine_chunks(), pa.array(ids, pa.string())])
    predict_at_us = flights["predict_at_us"].to_numpy()
    return Spine(entities, np.concatenate([predict_at_us, np.full(len(ids), BASE_MOMENT_US, dtype=np.int64)]))
