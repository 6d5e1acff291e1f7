"""Features as they were: any entity at any moment, from the events known by then."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.feature.define.definition import Source, View
from services.feature.define.rows import Computed
from services.feature.offline import sql, sql_places
from services.feature.offline.files import Files, OfflineError, file_facts
from services.feature.offline.sql import Clock
from services.feature.offline.sql import program as compile_program

__all__ = ["Clock", "OfflineError", "OfflineStore", "Spine"]

_ROWS_PER_MB = 6_000
"""Events and moments that one pass may work on per MB of memory; what is beyond that in a pass spills to disk."""
_BATCH_ROWS = 1 << 17


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

    folder: what the sources' paths are relative to; a path, or the URL of an fsspec file system ("s3://bucket/events").
    threads, memory_mb: what the engine may use; it spills to disk beyond.
    """

    folder: Path | str
    threads: int = 2
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if self.threads < 1 or self.memory_mb < 1:
            raise ValueError(f"threads and memory_mb must be at least 1, got {self.threads} and {self.memory_mb}")

    def compute(self, view: View, spine: Spine, clock: Clock = Clock.KNOWN) -> Computed:
        """One row per row of the spine, in its order. The same input gives the same bytes. Raises OfflineError.

        clock: EVENT joins by when events happened, which nobody knew: for showing what such a leak promises.
        """
        n, columns = len(spine), len(view.columns)
        # column after column, as they arrive
        values, null = np.zeros((columns, n)).T, np.ones((columns, n), dtype=np.bool_).T
        made = Computed(values, null, np.zeros(n, dtype=np.bool_))
        with self._connect() as con:
            program = self._program(con, view, clock)
            for part in _buckets(spine, self._bucket_count(con, view, n)):
                with self._named(con, view, clock):
                    _run(con, program, part, made)
        return made

    def entity_ids(self, view: View, moment_us: int) -> list[str]:
        """Every entity that something was known of before the moment, in order."""
        return list(self.first_known(view, moment_us))

    def first_known(self, view: View, before_us: int) -> dict[str, int]:
        """Every entity that something was known of before the moment, and since when; ordered by id."""
        return dict(self._known(view, before_us, "SELECT id, min(at_us) FROM known GROUP BY id ORDER BY id"))

    def active(self, view: View, begin_us: int, end_us: int) -> list[str]:
        """Every entity of which something became known from `begin_us` to before `end_us`, in order."""
        query = f"SELECT DISTINCT id FROM known WHERE at_us >= {int(begin_us)} ORDER BY id"  # noqa: S608
        return [row[0] for row in self._known(view, end_us, query)]

    def events(self, view: View, source: Source, entity_ids: Sequence[str], before_us: int) -> pa.Table:
        """The events of some of the view's entities that were known before the moment, in their order.

        Columns are those of the source: its times, sequence, entities, labels and the values that events carry.
        """
        times = (source.event_us, source.known_us, source.sequence)
        names = list(dict.fromkeys((*times, *source.entities, *source.labels, *source.plain)))
        with self._connect() as con, self._named(con, view):
            files = self._files(con, view, source)
            files.check(sql.needed(view, source, Clock.KNOWN))
            held = set(con.sql(f"FROM {files.relation()}").columns)
            columns = ", ".join(f'"{name}"' if name in held else f'NULL AS "{name}"' for name in names)
            con.register("wanted", pa.table({"id": pa.array(entity_ids, pa.string())}))
            where = f'"{view.entity}" IN (SELECT id FROM wanted) AND "{source.known_us}" < {int(before_us)}'  # noqa: S608
            order = f'"{source.known_us}", "{source.sequence}"'
            query = f"SELECT {columns} FROM {files.relation()} WHERE {where} ORDER BY {order}"  # noqa: S608
            return con.sql(query).to_arrow_reader(_BATCH_ROWS).read_all()

    def facts(self, sources: Sequence[Source]) -> dict[str, dict[str, int]]:
        """What tells whether sources' files are those of before: how many there are, their bytes and newest change."""
        return {source.name: file_facts(str(self.folder), source.path) for source in sources}

    def _known(self, view: View, before_us: int, query: str) -> list[tuple[str, int]]:
        with self._connect() as con, self._named(con, view):
            known = " UNION ALL ".join(
                sql.known_entities(view, source, self._files(con, view, source).relation(), int(before_us))
                for source in view.sources
            )
            return con.sql(f"WITH known AS ({known}) {query}").fetchall()

    def _program(self, con: duckdb.DuckDBPyConnection, view: View, clock: Clock) -> sql.Program:
        files = {source.name: self._files(con, view, source) for source in view.sources}
        for source in view.sources:
            files[source.name].check(sql.needed(view, source, clock))
        return compile_program(view, lambda source: files[source.name].relation(), clock=clock)

    def _files(self, con: duckdb.DuckDBPyConnection, view: View, source: Source) -> Files:
        return Files(con, str(self.folder), view, source)

    def _bucket_count(self, con: duckdb.DuckDBPyConnection, view: View, n: int) -> int:
        rows = n + sum(self._files(con, view, source).rows() for source in view.sources)
        return max(1, -(-rows // (_ROWS_PER_MB * self.memory_mb)))

    @contextmanager
    def _named(self, con: duckdb.DuckDBPyConnection, view: View, clock: Clock = Clock.KNOWN) -> Iterator[None]:
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            raise OfflineError(f"view {view.name!r}: memory_mb is too small: {error}") from error
        except duckdb.Error as error:
            for source in view.sources:
                if found := self._files(con, view, source).damage(sql.needed(view, source, clock)):
                    raise found from error
            raise OfflineError(f"view {view.name!r}: its events cannot be read: {error}") from error

    @contextmanager
    def _connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with tempfile.TemporaryDirectory(prefix="tenfold-offline-") as spill:
            config: dict[str, str | bool | int | float | list[str]] = {
                "threads": self.threads,
                "memory_limit": f"{self.memory_mb}MB",
                "temp_directory": spill,
                "preserve_insertion_order": False,
                # the queries are written in the order that is best, which the engine cannot know
                "disabled_optimizers": "join_order",
            }
            with duckdb.connect(config=config) as con:
                yield con


def _run(con: duckdb.DuckDBPyConnection, program: sql.Program, spine: pa.Table, made: Computed) -> None:
    con.register("given_spine", spine)
    steps = [(sql.SPINE, "SELECT * FROM given_spine"), *program.steps]
    for name, query in steps:
        if name in program.places:
            sql_places.find(con, name, query, program.places[name])
        else:
            con.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")
    for batch in con.sql(program.rows).to_arrow_reader(_BATCH_ROWS):
        at = batch.column(0).to_numpy()
        made.known[at] = True
        for number in range(made.values.shape[1]):
            column = batch.column(number + 1)
            if column.null_count:
                made.null[at, number] = column.is_null().to_numpy(zero_copy_only=False)
                column = column.fill_null(0.0)
            else:
                made.null[at, number] = False
            made.values[at, number] = column.to_numpy()
    for name, _ in steps:
        if name in program.places:
            sql_places.forget(con, name)
        else:
            con.execute(f"DROP TABLE {name}")
    con.unregister("given_spine")


def _buckets(spine: Spine, count: int) -> Iterator[pa.Table]:
    """The spine's rows with an entity, all rows of an entity together."""
    ids = pa.array(spine.entity_ids, type=pa.string())
    table = pa.table({
        "row_id": pa.array(np.arange(len(spine), dtype=np.int64)),
        "entity_id": ids,
        "as_of_us": pa.array(spine.as_of_us, type=pa.int64()),
    })  # fmt: skip
    if count == 1:
        yield table
        return
    codes = ids.dictionary_encode().indices.fill_null(-1).to_numpy()
    for bucket in range(count):
        yield table.filter(pa.array((codes >= 0) & (codes % count == bucket)))
