"""The limits offline, as a worker: engines that do nothing but the join, and rows moved with nothing in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from numpy.typing import NDArray

from loadtest.bench.feature_arms import packed
from loadtest.bench.feature_arms.lines import answer
from loadtest.bench.feature_arms.sizes import COLUMNS, FEATURES, VIEWS
from loadtest.bench.feature_arms.truth import wrong_rows

_ROWS_PER_MSET = 2000


def join(engine: str, folder: str, volume: str) -> dict[str, Any]:
    """Seconds for labels with 50 features, in memory; and how many rows are wrong."""
    started = time.perf_counter()
    found = _JOINS[engine](Path(folder), volume)
    elapsed_s = time.perf_counter() - started
    order = np.argsort(found["label_id"].to_numpy())
    values = np.stack([_floats(found[name]) for name in COLUMNS], axis=1)[order]
    expected = np.load(Path(folder) / f"truth_{volume}.npy")
    return {"s": elapsed_s, "rows": len(values), "wrong": wrong_rows(values, expected)}


def asof(folder: Path, volume: str) -> pa.Table:
    """DuckDB's ASOF JOIN."""
    columns = ", ".join(COLUMNS)
    joins = " ".join(
        f"ASOF LEFT JOIN read_parquet('{folder}/{view}_{volume}.parquet') {view} "
        f"ON label.entity_id = {view}.entity_id AND label.as_of_us > {view}.known_us"
        for view in VIEWS
    )
    query = f"SELECT label_id, {columns} FROM read_parquet('{folder}/labels_{volume}.parquet') label {joins}"
    with _connect() as con:
        return con.sql(query).to_arrow_table()


def gather(folder: Path, volume: str) -> pa.Table:
    """The ASOF JOIN on keys alone, for the place of each row; then every feature is gathered from there."""
    found: pa.Table = pq.read_table(folder / f"labels_{volume}.parquet", columns=["label_id"])
    with _connect() as con:
        for view in VIEWS:
            events = folder / f"{view}_{volume}.parquet"
            places = (
                con.sql(f"""
                SELECT event.place FROM read_parquet('{folder}/labels_{volume}.parquet') label ASOF LEFT JOIN (
                    SELECT entity_id, known_us, file_row_number AS place
                    FROM read_parquet('{events}', file_row_number = true)
                ) event ON label.entity_id = event.entity_id AND label.as_of_us > event.known_us
                ORDER BY label_id""")
                .to_arrow_table()["place"]
                .combine_chunks()
            )
            features = pq.read_table(events, columns=list(FEATURES[view]))
            for name in FEATURES[view]:
                found = found.append_column(name, features[name].combine_chunks().take(places))
    return found


def polars(folder: Path, volume: str) -> pl.DataFrame:
    """Polars' join_asof."""
    labels = pl.scan_parquet(folder / f"labels_{volume}.parquet").sort("as_of_us")
    for view in VIEWS:
        events = pl.scan_parquet(folder / f"{view}_{volume}.parquet").select("entity_id", "known_us", *FEATURES[view])
        labels = labels.join_asof(
            events.sort("known_us"),
            left_on="as_of_us",
            right_on="known_us",
            by="entity_id",
            strategy="backward",
            check_sortedness=False,
            coalesce=False,
        ).drop("known_us")
    return labels.select("label_id", *COLUMNS).collect()


_JOINS: dict[str, Callable[[Path, str], Any]] = {"asof": asof, "gather": gather, "polars": polars}


def materialize(folder: str, port: int) -> dict[str, Any]:
    """Seconds from Parquet to a Valkey that holds every entity's latest row."""
    store: Any = redis.Redis(port=port)
    started, count = time.perf_counter(), 0
    for view, (ids, event_us, values) in ((view, _latest(Path(folder), view)) for view in VIEWS):
        rows = packed.pack(view, event_us, values)
        prefix = f"p:{view}:".encode()
        for start in range(0, len(rows), _ROWS_PER_MSET):
            words: list[bytes] = []
            for entity_id, row in zip(ids[start : start + _ROWS_PER_MSET], rows[start:], strict=False):
                words += (prefix + entity_id.encode(), row)
            store.execute_command("MSET", *words)
        count += len(rows)
    elapsed_s = time.perf_counter() - started
    store.close()
    return {"s": elapsed_s, "rows": count}


def _latest(folder: Path, view: str) -> tuple[list[str], NDArray[np.int64], NDArray[np.float32]]:
    query = f"""
        SELECT entity_id, event_us, {", ".join(FEATURES[view])} FROM read_parquet('{folder}/{view}_1x.parquet')
        QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY known_us DESC) = 1"""
    with _connect() as con:
        found = con.sql(query).to_arrow_table()
    values = np.empty((len(found), len(FEATURES[view])), np.float32)
    for number, name in enumerate(FEATURES[view]):
        values[:, number] = found[name].to_numpy()
    return found["entity_id"].to_pylist(), found["event_us"].to_numpy(), values


def _connect() -> Any:
    return duckdb.connect(config={"threads": os.cpu_count() or 1})


def _floats(column: Any) -> NDArray[np.float32]:
    values = column.to_numpy() if isinstance(column, pl.Series) else column.to_numpy(zero_copy_only=False)
    return np.asarray(values, np.float32)


if __name__ == "__main__":
    answer({"join": join, "materialize": materialize})
