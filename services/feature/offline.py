"""Features as they were: any entity at any moment, from the events known by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.feature import sql
from services.feature.definition import Source, View


class OfflineError(RuntimeError):
    """The events cannot be read; the message names the view, the source and the file."""


@dataclass(frozen=True, slots=True)
class Spine:
    """Whose features, and at which moment: n pairs in any order, repeated at will.

    entity_ids: None where there is no entity. as_of_us: int64 (n,), microseconds since 1970 UTC.
    """

    entity_ids: Sequence[str | None] | pa.Array
    as_of_us: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.entity_ids) != len(self.as_of_us):
            raise ValueError(
                f"a spine needs one moment per entity, got {len(self.entity_ids)} and {len(self.as_of_us)}"
            )

    def __len__(self) -> int:
        return len(self.as_of_us)


@dataclass(frozen=True, slots=True)
class OfflineStore:
    """Parquet files, and the engine that reads them.

    folder: what the sources' paths are relative to. threads, memory_mb: what the engine may use.
    """

    folder: Path
    threads: int = 2
    memory_mb: int = 2048

    def compute(self, view: View, spine: Spine) -> NDArray[np.float32]:
        """float32 (n, columns of the view), one row per row of the spine and in its order; NaN for null.

        Only events with as_of - window <= known_us < as_of take part. An entity that nothing was known of by then
        has a row of nulls, as the online store would have no row for it. The same input gives the same bytes.
        """
        rows = np.full((len(spine), len(view.columns)), np.nan, dtype=np.float32)
        with self._connect() as con:
            con.register("given_spine", _table(spine))
            _create(con, sql.SPINE, "SELECT * FROM given_spine")
            try:
                for name, query in sql.steps(view, lambda source: self.relation(view, source)):
                    _create(con, name, query)
            except (duckdb.BinderException, duckdb.ConversionException, duckdb.IOException) as error:
                raise OfflineError(f"view {view.name!r}: its events cannot be read: {error}") from error
            for batch in con.sql(sql.features(view)).to_arrow_reader(65_536):
                at = batch.column(0).to_numpy()
                for number in range(len(view.columns)):
                    rows[at, number] = batch.column(number + 1).to_numpy(zero_copy_only=False)
        return rows

    def entity_ids(self, view: View, moment_us: int) -> list[str]:
        """Every entity that something was known of before the moment, in order."""
        known = " UNION ALL ".join(
            f"SELECT {view.entity} AS id FROM {self.relation(view, source)} "  # noqa: S608 - names are checked
            f"WHERE {source.known_us} < {int(moment_us)}"
            for source in view.sources
        )
        with self._connect() as con:
            ids = con.sql(f"SELECT DISTINCT id FROM ({known}) WHERE id IS NOT NULL ORDER BY id")  # noqa: S608
            return [row[0] for row in ids.fetchall()]

    def relation(self, view: View, source: Source) -> str:
        """What stands in FROM for `source`."""
        if not any(self.folder.glob(source.path)):
            raise OfflineError(f"view {view.name!r}: source {source.name!r} has no file {self.folder / source.path}")
        path = str(self.folder / source.path).replace("'", "''")
        return f"read_parquet('{path}')"

    def _connect(self) -> duckdb.DuckDBPyConnection:
        return duckdb.connect(
            config={
                "threads": self.threads,
                "memory_limit": f"{self.memory_mb}MB",
                "preserve_insertion_order": False,
            }
        )


def _create(con: duckdb.DuckDBPyConnection, name: str, query: str) -> None:
    con.execute(f"CREATE TEMP TABLE {name} AS {query}")


def _table(spine: Spine) -> pa.Table:
    columns = {
        "row_id": pa.array(np.arange(len(spine), dtype=np.int64)),
        "entity_id": pa.array(spine.entity_ids, type=pa.string()),
        "as_of_us": pa.array(spine.as_of_us, type=pa.int64()),
    }
    return pa.table(columns)
