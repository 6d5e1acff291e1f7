"""Feast, as a worker: definitions applied, features materialised, training sets joined."""

from __future__ import annotations

import datetime as dt
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Float64

from loadtest.bench.feature_arms import contract
from loadtest.bench.feature_arms.lines import answer
from loadtest.bench.feature_arms.sizes import COLUMNS, END_US, FEATURES, START_US, VIEWS
from loadtest.bench.feature_arms.truth import wrong_rows

SERVICE = "all"
_TTL = dt.timedelta(days=40)  # longer than the events span
_ENTITY = Entity(name="entity", join_keys=["entity_id"], value_type=ValueType.STRING)
_stores: dict[str, FeatureStore] = {}


def apply(name: str, repository: str, folder: str, volume: str, engine: str, port: int) -> None:
    """A repository of its own with both views. engine: "duckdb" or "dask"."""
    views = [
        FeatureView(
            name=view,
            entities=[_ENTITY],
            ttl=_TTL,
            online=True,
            schema=[Field(name=feature, dtype=Float32) for feature in FEATURES[view]],
            source=FileSource(
                name=f"source_{view}",
                path=f"{folder}/feast_{view}_{volume}.parquet",
                timestamp_field="event_timestamp",
            ),
        )
        for view in VIEWS
    ]
    store = _repository(Path(repository), engine, f'{{type: redis, connection_string: "127.0.0.1:{port}"}}')
    store.apply([_ENTITY, *views, FeatureService(name=SERVICE, features=views)])
    _stores[name] = store


def materialize(name: str) -> dict[str, Any]:
    started = time.perf_counter()
    _stores[name].materialize(_moment(START_US), _moment(END_US))
    return {"s": time.perf_counter() - started}


def join(name: str, folder: str, volume: str) -> dict[str, Any]:
    """Seconds for labels with 50 features; how many rows came back, and how many of those are wrong."""
    columns = ["label_id", "entity_id", "event_timestamp"]
    labels = pd.read_parquet(Path(folder) / f"labels_{volume}.parquet", columns=columns)
    features = [f"{view}:{feature}" for view in VIEWS for feature in FEATURES[view]]
    started = time.perf_counter()
    found = _stores[name].get_historical_features(entity_df=labels, features=features).to_df()
    elapsed_s = time.perf_counter() - started
    expected = np.load(Path(folder) / f"truth_{volume}.npy")[found["label_id"].to_numpy()]
    values = found[list(COLUMNS)].to_numpy(np.float32)
    return {"s": elapsed_s, "rows": len(found), "wrong": wrong_rows(values, expected)}


def right_rows(repository: str, engine: str) -> int:
    """Of the contract's labels."""
    folder = Path(repository)
    store = _repository(folder, engine, "{type: sqlite, path: online.db}")
    events = pd.DataFrame(
        [(event.entity_id, _moment(event.event_us), event.x) for event in contract.EVENTS],
        columns=["entity_id", "event_timestamp", "x"],
    )
    labels = pd.DataFrame(
        [(label.entity_id, _moment(contract.MOMENT_US), label.case) for label in contract.LABELS],
        columns=["entity_id", "event_timestamp", "case"],
    )
    events.to_parquet(folder / "events.parquet")
    view = FeatureView(
        name="view",
        entities=[_ENTITY],
        ttl=dt.timedelta(hours=contract.TTL_H),
        schema=[Field(name="x", dtype=Float64)],
        source=FileSource(path=str(folder / "events.parquet"), timestamp_field="event_timestamp"),
    )
    store.apply([_ENTITY, view])
    found = store.get_historical_features(entity_df=labels, features=["view:x"]).to_df()
    values = {row.case: None if pd.isna(row.x) else float(row.x) for row in found.itertuples()}
    return contract.right_rows(values, at_the_moment=5.0)


def _repository(folder: Path, engine: str, online_store: str) -> FeatureStore:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = (
        "project: bench",
        "registry: registry.db",
        "provider: local",
        f"offline_store: {{type: {engine}}}",
        f"online_store: {online_store}",
        "entity_key_serialization_version: 3",
    )
    (folder / "feature_store.yaml").write_text("\n".join(lines))
    return FeatureStore(repo_path=str(folder))


def _moment(us: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(us / 1e6, dt.UTC)


if __name__ == "__main__":
    answer({"apply": apply, "materialize": materialize, "join": join, "right_rows": right_rows})
