"""tenfold's side: offline as a worker, online as a process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loadtest.bench.feature_arms import contract
from loadtest.bench.feature_arms.lines import answer
from loadtest.bench.feature_arms.sizes import END_US, FEATURES, VIEWS
from loadtest.bench.feature_arms.truth import wrong_rows
from services.feature.define.definition import Aggregate, Feature, Source, View
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online import loading
from services.feature.online.store import OnlineStore
from services.feature.online.table import Table
from services.feature.online.tables import open_table
from services.resilience.errors import Unavailable

MESH = "bench"
_MESH_FILE = f"""\
version = 1
name = "{MESH}"
priorities = [
    {{ name = "critical", slo_p99_ms = 100, max_in_flight = 64 }},
    {{ name = "standard", slo_p99_ms = 100, max_in_flight = 64 }},
    {{ name = "background", slo_p99_ms = 100, max_in_flight = 64 }},
]

[[models]]
name = "none"
output = "none"
tiers = [{{ name = "none", model = "none", quality = 1, usd_per_1000 = 0, expected_ms = 1 }}]
required_quality = {{ critical = 0, standard = 0, background = 0 }}
"""
_MOST_CACHED_ROWS = 20_000  # the service's own choice
_CONNECT_S = 10.0


def command() -> list[str]:
    return [sys.executable, "-m", "services.feature"]


def environment(
    folder: Path, address: str, store_port: int, transport: str, entities: int, definitions: str
) -> Mapping[str, str]:
    """Of `command`. folder: a place for the mesh file. entities: in the store, of which few fit into the cache."""
    mesh_file = folder / f"{definitions or 'tenfold'}.toml"
    mesh_file.write_text(_MESH_FILE + (f'\n[features]\ndefinitions = "{definitions}"\n' if definitions else ""))
    return {
        **os.environ,
        "TENFOLD_MESH_FILE": str(mesh_file),
        "TENFOLD_LISTEN": address,
        "TENFOLD_INSTANCE": f"feature-{transport}",
        "TENFOLD_STORE": f"redis://127.0.0.1:{store_port}",
        "TENFOLD_TRANSPORT": transport,
        "TENFOLD_CACHE_ENTRIES": str(min(_MOST_CACHED_ROWS, entities // 5)),
        "TENFOLD_DIE_WITH_PARENT": "1",
    }


def view_of(name: str, volume: str) -> View:
    """The latest value of each column, as Feast and the limits have it."""
    source = Source(
        name=f"events_{name}",
        path=f"{name}_{volume}.parquet",
        event_us="event_us",
        known_us="known_us",
        sequence="seq",
        entities=("entity_id",),
        values=FEATURES[name],
    )
    return View(name, "entity_id", [Feature(source, Aggregate.LAST, value) for value in FEATURES[name]])


def materialize(folder: str, port: int) -> dict[str, Any]:
    """Seconds from Parquet to a Valkey that holds every entity's latest row: loaded, verified and published."""
    started = time.perf_counter()
    loaded = asyncio.run(_materialize(Path(folder), port))
    return {"s": time.perf_counter() - started, "rows": sum(view.rows for view in loaded)}


async def _materialize(folder: Path, port: int) -> list[loading.Loaded]:
    views = [view_of(name, "1x") for name in VIEWS]
    async with open_table(f"redis://127.0.0.1:{port}") as table:
        await _reached(table)
        return await loading.load(_offline(folder), OnlineStore(table, MESH), views, END_US)


async def _reached(table: Table) -> None:
    async with asyncio.timeout(_CONNECT_S):
        while True:
            with contextlib.suppress(Unavailable):
                return await table.ping(_CONNECT_S)
            await asyncio.sleep(0.001)


def join(folder: str, volume: str) -> dict[str, Any]:
    """Seconds for labels with 50 features, in memory; and how many rows are wrong."""
    started = time.perf_counter()
    values = _joined(Path(folder), volume)
    elapsed_s = time.perf_counter() - started
    expected = np.load(Path(folder) / f"truth_{volume}.npy")
    return {"s": elapsed_s, "rows": len(values), "wrong": wrong_rows(values, expected)}


def digest(folder: str, volume: str) -> str:
    """Of the bytes that a join has for an answer."""
    return hashlib.sha256(_joined(Path(folder), volume).tobytes()).hexdigest()


def _joined(folder: Path, volume: str) -> NDArray[np.float32]:
    labels = pq.read_table(folder / f"labels_{volume}.parquet", columns=["entity_id", "as_of_us"])
    spine = Spine(labels["entity_id"].combine_chunks(), labels["as_of_us"].to_numpy())
    offline = _offline(folder)
    return np.concatenate([_compute(offline, view_of(name, volume), spine) for name in VIEWS], axis=1)


def right_rows(folder: str) -> int:
    """Of the contract's labels."""
    at = Path(folder)
    at.mkdir(parents=True, exist_ok=True)
    pq.write_table(_contract_events(contract.EVENTS), at / "events.parquet")
    source = Source("events", "events.parquet", "event_us", "known_us", "seq", ("entity_id",), ("x",))
    view = View("view", "entity_id", [Feature(source, Aggregate.LAST, "x", window=f"{contract.TTL_H}h")])
    moments = np.full(len(contract.LABELS), contract.MOMENT_US)
    found = _compute(_offline(at), view, Spine([label.entity_id for label in contract.LABELS], moments))[:, 0]
    values = {label.case: None if np.isnan(x) else float(x) for label, x in zip(contract.LABELS, found, strict=True)}
    return contract.right_rows(values)


def _contract_events(events: Sequence[contract.Event]) -> pa.Table:
    times = pa.array([event.event_us for event in events])
    return pa.table(
        {
            "entity_id": [event.entity_id for event in events],
            "event_us": times,
            "known_us": times,
            "seq": [event.seq for event in events],
            "x": [event.x for event in events],
        }
    )


def _offline(folder: Path) -> OfflineStore:
    return OfflineStore(folder, threads=os.cpu_count() or 1)


def _compute(offline: OfflineStore, view: View, spine: Spine) -> NDArray[np.float32]:
    found: Any = offline.compute(view, spine)
    values: NDArray[np.float32] = found if isinstance(found, np.ndarray) else found.float32()
    return values


if __name__ == "__main__":
    answer({"materialize": materialize, "join": join, "digest": digest, "right_rows": right_rows})
