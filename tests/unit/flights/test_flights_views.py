from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np

import deploy.flights
from deploy.flights import dataset
from deploy.flights.data import ENTITIES
from deploy.flights.views import VIEWS
from services.feature.offline.store import OfflineStore, Spine
from services.mesh import meshfile


def test_the_views_are_those_of_the_mesh_file() -> None:
    mesh = meshfile.load(Path(deploy.flights.__file__).with_name("tenfold.toml"))
    assert mesh.models[0].views == [view.name for view in VIEWS]


def test_there_are_more_than_50_features_over_at_least_4_entities() -> None:
    assert sum(len(view.columns) for view in VIEWS) > 50
    assert {view.entity for view in VIEWS} == set(ENTITIES)


# what was not known at the moment, turned into something else that was not known either
CHANGED = {
    "flights": """* REPLACE (
        CASE WHEN departed_us >= {now} THEN 1 - cancelled ELSE cancelled END AS cancelled,
        CASE WHEN departed_us >= {now} THEN 999 ELSE dep_delay END AS dep_delay,
        CASE WHEN departed_us >= {now} THEN departed_us + 1000000 ELSE departed_us END AS departed_us,
        CASE WHEN arrived_us >= {now} THEN 1 - late ELSE late END AS late,
        CASE WHEN arrived_us >= {now} THEN 999 ELSE arr_delay END AS arr_delay,
        CASE WHEN arrived_us >= {now} THEN arrived_us + 1000000 ELSE arrived_us END AS arrived_us)""",
    "weather": "* REPLACE (CASE WHEN known_us >= {now} THEN 999 ELSE temp END AS temp)",
}


def test_what_is_not_known_at_the_moment_of_a_prediction_never_changes_its_features(
    tmp_path: Path, write_some_events: Callable[[Path], None]
) -> None:
    write_some_events(tmp_path / "so")
    flights = dataset.read_flights(tmp_path / "so")
    now = int(np.median(flights["predict_at_us"].to_numpy()))
    for name, columns in CHANGED.items():
        (tmp_path / "otherwise" / name).mkdir(parents=True)
        rows = f"SELECT {columns.format(now=now)} FROM '{tmp_path}/so/{name}/*.parquet'"
        duckdb.sql(f"COPY ({rows}) TO '{tmp_path}/otherwise/{name}/2013.parquet' (FORMAT parquet)")
    for view in VIEWS:
        ids = sorted({entity for entity in flights[view.entity].to_pylist() if entity})
        for moment_us, same in ((now, True), (now + 86_400_000_000, False)):
            spine = Spine(ids, np.full(len(ids), moment_us, dtype=np.int64))
            so, otherwise = (
                OfflineStore(tmp_path / which).compute(view, spine).float32() for which in ("so", "otherwise")
            )
            assert np.isfinite(so).any()
            assert (so.tobytes() == otherwise.tobytes()) is same, view.name
