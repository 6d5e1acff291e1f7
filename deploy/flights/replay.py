"""Held-out flights as the mesh would have met them: what was stored when each was asked about, and what came true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet
from numpy.typing import NDArray

from deploy.flights.data import ENTITIES, INPUTS
from deploy.flights.dataset import BASE_MOMENT_US
from deploy.flights.prepare import FOLDER
from deploy.flights.views import VIEWS
from services.feature.define.schema import ViewSchema
from services.feature.online.materialize import OnlineWriter, Rows, in_chunks, write

NO_AIRCRAFT = "unknown"
"""The tailnum of a flight that no aircraft was recorded for; no view has a row for it."""


@dataclass(frozen=True, slots=True)
class Flight:
    """One prediction to ask for, and what came true.

    designator: as travellers know it, "UA1545". label: 1 if at least 15 min late, cancelled or diverted, else 0.
    """

    flight_id: int
    designator: str
    predict_at_us: int
    entities: Mapping[str, str]
    inputs: Mapping[str, float]
    label: int


@dataclass(frozen=True, slots=True)
class Write:
    """A row that the stream had stored by a moment. values: float32 (columns,), NaN for null."""

    schema: ViewSchema
    entity_id: str
    event_us: int
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Board:
    """Flights in the order of their predictions; writes[i] are to be stored before flights[i] is asked about."""

    flights: Sequence[Flight]
    writes: Sequence[Sequence[Write]]


def board(home: Path, n: int = 500, seed: int = 0) -> Board:
    """`n` flights of November and December: one at random of each of n equal parts of the time order.

    Raises ValueError where there are fewer held-out flights than `n`.
    """
    files = [home / FOLDER / "offline" / "flights" / f"2013-{month}.parquet" for month in (11, 12)]
    held_out = pa.concat_tables(pa.parquet.read_table(file) for file in files)
    held_out = held_out.sort_by([("predict_at_us", "ascending"), ("flight_id", "ascending")])
    if not 1 <= n <= len(held_out):
        raise ValueError(f"n must be 1 to {len(held_out)}, got {n}")
    edges = np.linspace(0, len(held_out), n + 1).astype(np.int64)
    picked = held_out.take(np.random.default_rng(seed).integers(edges[:-1], edges[1:]))
    flights = [_flight(row) for row in picked.to_pylist()]
    writes: dict[int, list[Write]] = {flight.flight_id: [] for flight in flights}
    for view in VIEWS:
        for flight_id, row in _stored(home / FOLDER / "holdout" / f"{view.name}.parquet", view.schema(), picked):
            writes[flight_id].append(row)
    return Board(flights, [writes[flight.flight_id] for flight in flights])


def next_departure(home: Path, designator: str, after_us: int) -> Flight | None:
    """The next scheduled flight of a designator ("UA1545") that departs after the moment; None where none does."""
    files = sorted(str(path) for path in (home / FOLDER / "offline" / "flights").glob("*.parquet"))
    wanted = (pc.field("flight_no") == designator) & (pc.field("departs_us") > after_us)
    found = pa.dataset.dataset(files).to_table(filter=wanted).sort_by("flight_id").slice(0, 1).to_pylist()
    return _flight(found[0]) if found else None


async def fill(home: Path, online: OnlineWriter) -> dict[str, int]:
    """Writes every view as of BASE_MOMENT_US into an empty store and publishes it; rows per view."""
    written = {}
    for view in VIEWS:
        table = pa.parquet.read_table(home / FOLDER / "base" / f"{view.name}.parquet")
        rows = Rows(view.schema(), table["entity_id"].to_pylist(), BASE_MOMENT_US, _matrix(table, view.columns))
        written[view.name] = await write(online, in_chunks(rows))
    await online.publish([view.schema() for view in VIEWS], BASE_MOMENT_US, written)
    return written


def _flight(row: Mapping[str, Any]) -> Flight:
    return Flight(
        flight_id=row["flight_id"],
        designator=row["flight_no"],
        predict_at_us=row["predict_at_us"],
        entities={entity: row[entity] or NO_AIRCRAFT for entity in ENTITIES},
        inputs={name: float(row[name]) for name in INPUTS},
        label=int(row["late"]),
    )


def _stored(path: Path, schema: ViewSchema, picked: pa.Table) -> Iterator[tuple[int, Write]]:
    """(flight id, row) for those of the picked flights that there is a row for."""
    chosen = pc.field("flight_id").isin(picked["flight_id"].combine_chunks())
    rows = pa.dataset.dataset(path).to_table(filter=chosen)
    values = _matrix(rows, schema.columns)
    keys = zip(*(rows[name].to_pylist() for name in ("flight_id", "entity_id", "event_us")), strict=True)
    for at, (flight_id, entity_id, event_us) in enumerate(keys):
        yield flight_id, Write(schema, entity_id, event_us, values[at])


def _matrix(table: pa.Table, columns: Sequence[str]) -> NDArray[np.float32]:
    return np.column_stack([table[column].to_numpy() for column in columns])
