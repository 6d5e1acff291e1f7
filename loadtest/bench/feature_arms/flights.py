"""The demonstration's features by every path and on both engines, as a worker."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deploy.flights.data import DataError, package_version, write_events
from deploy.flights.views import VIEWS
from loadtest.bench.feature_arms.lines import answer
from services.feature.check import checks
from services.feature.define.definition import View
from services.feature.define.rows import Computed
from services.feature.offline.spark import SparkEngine
from services.feature.offline.store import OfflineStore, Spine

_SPARK_VIEW = "carrier_origin"
_NO_JAVA = "Spark needs Java, and there is none"
_SPARK = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "2g",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.adaptive.enabled": "false",
}


def without_data() -> str:
    """Why there are no flights here; empty where there are."""
    try:
        package_version()
    except DataError as error:
        return str(error)
    return ""


def write(folder: str) -> list[str]:
    """The events; the views' names."""
    write_events(Path(folder))
    return [view.name for view in VIEWS]


def replayed(folder: str, view: str, day: str, rows: int) -> dict[str, tuple[int, int]]:
    """Path -> values of the day that were compared with batch, and those that differ."""
    checked = checks.day(_offline(folder), [_view(view)], dt.date.fromisoformat(day), rows=rows)
    return {
        one.path: (sum(column.rows for column in one.columns), sum(column.mismatched for column in one.columns))
        for one in checked
    }


def without_spark() -> str:
    """Why there is no Spark here; empty where there is."""
    try:
        import pyspark  # noqa: F401
    except ImportError:
        return "the extra `spark` is not installed"
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if java is None or subprocess.run([java, "-version"], capture_output=True, check=False).returncode:
        return _NO_JAVA
    return ""


def on_spark(folder: str, scratch: str, rows: int) -> dict[str, Any]:
    """One view on DuckDB and on Spark: values compared; counts and nulls that differ; by how much others do, at worst.

    scratch: for what Spark keeps on disk. The difference is relative to the larger of both.
    """
    view, spine = _view(_SPARK_VIEW), _spine(Path(folder), rows)
    duckdb = _offline(folder).compute(view, spine)
    spark = _spark(view, spine, folder, Path(scratch))
    counts = np.array(["count" in column for column in view.columns])
    both = ~duckdb.null & ~spark.null
    a, b = duckdb.values, spark.values
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    larger = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.finfo(np.float64).tiny)
    off = np.where(both & ~same, np.abs(a - b) / larger, 0.0)
    return {
        "values": int(a.size),
        "nulls": int((duckdb.null != spark.null).sum() + (duckdb.known != spark.known).sum()),
        "counts": int((both & ~same)[:, counts].sum()),
        "worst": float(np.nan_to_num(off, nan=np.inf).max(initial=0.0)),
    }


def _spine(folder: Path, rows: int) -> Spine:
    """Scheduled departures here and there, and one entity that nobody knows."""
    columns = ["carrier_origin", "predict_at_us"]
    flights = pa.concat_tables(
        [pq.read_table(one, columns=columns) for one in sorted(folder.glob("flights/*.parquet"))]
    )
    chosen = np.random.default_rng(1).choice(len(flights), rows - 1, replace=False)
    ids = [*flights["carrier_origin"].take(chosen).to_pylist(), "nobody"]
    moments: NDArray[np.int64] = flights["predict_at_us"].to_numpy()[chosen]
    return Spine(ids, np.append(moments, moments[0]))


def _spark(view: View, spine: Spine, folder: str, scratch: Path) -> Computed:
    from pyspark.sql import SparkSession

    scratch.mkdir(parents=True)
    places = {"spark.local.dir": scratch, "spark.sql.warehouse.dir": scratch / "warehouse"}
    java = {"spark.driver.extraJavaOptions": f"-Djava.io.tmpdir={scratch}"}
    builder = SparkSession.builder.master("local[2]").appName("tenfold")
    for name, value in {**_SPARK, **places, **java}.items():
        builder = builder.config(name, str(value))
    session = builder.getOrCreate()
    try:
        table = {"row_id": range(len(spine)), "entity_id": spine.entity_ids, "as_of_us": spine.as_of_us}
        pq.write_table(pa.table({name: pa.array(column) for name, column in table.items()}), scratch / "spine.parquet")
        events = {source.name: f"{folder}/{source.path}" for source in view.sources}
        asked = session.read.parquet(str(scratch / "spine.parquet"))
        SparkEngine(session).compute(view, asked, events).write.parquet(str(scratch / "rows"))
    finally:
        session.stop()
    found = pq.read_table(scratch / "rows").sort_by("row_id")
    columns = [found[column] for column in view.columns]
    return Computed(
        np.array([column.fill_null(0.0).to_numpy() for column in columns]).T,
        np.array([column.is_null().to_numpy() for column in columns]).T,
        np.array(found["known"].to_pylist(), dtype=np.bool_),
    )


def _offline(folder: str) -> OfflineStore:
    return OfflineStore(Path(folder), threads=os.cpu_count() or 1)


def _view(name: str) -> View:
    return next(view for view in VIEWS if view.name == name)


if __name__ == "__main__":
    answer(
        {
            "without_data": without_data,
            "write": write,
            "replayed": replayed,
            "without_spark": without_spark,
            "on_spark": on_spark,
        }
    )
