"""Training sets: every label with the features as they were at its moment.

Labels are a Parquet or CSV file, or a folder of them: a column of moments, one column per entity that the views are
about, the inputs that request views read, and anything else, which travels along. The output has every label row, in
order, and after its columns one float32 column per feature, "<view>.<column>": as it would have been served then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from numpy.typing import NDArray

from services.feature.define.definition import RequestView, View
from services.feature.define.events import Numbers
from services.feature.define.rows import Computed
from services.feature.offline.parts import Parts
from services.feature.offline.store import Clock, OfflineStore, Spine

CHUNK_ROWS = 250_000
"""Labels that are joined at a time: with 150 features about 300 MB."""

Progress = Callable[[int, int], None]
"""Told the rows that are done, and all of them."""


class LabelsError(ValueError):
    """The labels cannot be joined; the message names the file and the column."""


@dataclass(frozen=True, slots=True)
class Labels:
    """path: a file or folder, or a URL. time: the column of moments: timestamps, or int64 microseconds since 1970 UTC.

    entities: entity -> the column that holds its ids, where that has another name.
    """

    path: str
    time: str
    entities: Mapping[str, str]

    def column_of(self, entity: str) -> str:
        return self.entities.get(entity, entity)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which features to join, and by which clock: Clock.EVENT sees what was not known yet, to show what that does."""

    views: Sequence[View]
    request_views: Sequence[RequestView] = ()
    clock: Clock = Clock.KNOWN

    @property
    def columns(self) -> tuple[str, ...]:
        views: Sequence[View | RequestView] = (*self.views, *self.request_views)
        return tuple(f"{view.name}.{column}" for view in views for column in view.columns)


def training_set(
    offline: OfflineStore,
    labels: Labels,
    wanted: Wanted,
    out: str,
    *,
    chunk_rows: int = CHUNK_ROWS,
    restart: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> Parts:
    """Writes the training set into the folder `out`, in parts; one that was cut off goes on where it stopped.

    Raises LabelsError, OfflineError or PartsError; parts that are whole stay.
    """
    dataset, size = _open(labels)
    _check(labels, wanted, dataset.schema)
    total = dataset.count_rows()
    facts = {
        "labels": {"path": labels.path, "rows": total, "bytes": size},
        "time": labels.time,
        "entities": {view.entity: labels.column_of(view.entity) for view in wanted.views},
        "clock": wanted.clock.value,
        "views": {view.name: view.fingerprint() for view in wanted.views},
        "request_views": {view.name: [[f.name, f.expression] for f in view.features] for view in wanted.request_views},
        "events": offline.facts([source for view in wanted.views for source in view.sources]),
        "chunk_rows": chunk_rows,
    }
    parts = Parts.open(out, facts, restart=restart)
    done = 0
    for number, chunk in enumerate(_chunks(dataset, chunk_rows)):
        name = f"part-{number:05d}"
        if parts.missing([name]):
            parts.write(name, join(offline, labels, wanted, chunk))
        done += chunk.num_rows
        progress(done, total)
    return parts


def examined(labels: Labels, wanted: Wanted) -> int:
    """How many rows the labels have. Raises LabelsError as `training_set` would."""
    dataset, _ = _open(labels)
    _check(labels, wanted, dataset.schema)
    return int(dataset.count_rows())


def join(offline: OfflineStore, labels: Labels, wanted: Wanted, chunk: pa.Table) -> pa.Table:
    """The same rows in the same order, with the features' columns after those that were there."""
    moments = _moments(labels, chunk)
    found: dict[str, Computed] = {}
    for view in wanted.views:
        ids = pc.cast(chunk[labels.column_of(view.entity)], pa.string()).combine_chunks()
        found[view.name] = offline.compute(view, Spine(ids, moments), wanted.clock)
    table = chunk
    for view in wanted.views:
        for at, (column, default) in enumerate(zip(view.columns, view.defaults, strict=True)):
            array = _float32(found[view.name].values[:, at], found[view.name].null[:, at], default)
            table = table.append_column(f"{view.name}.{column}", array)
    if wanted.request_views:
        known = _known(wanted, found, chunk)
        for request_view in wanted.request_views:
            expressions = request_view.expressions(wanted.views)
            for column, expression in zip(request_view.columns, expressions, strict=True):
                values, null = expression.evaluate(known)
                table = table.append_column(f"{request_view.name}.{column}", _float32(values, null, None))
    return table


def _known(wanted: Wanted, found: Mapping[str, Computed], chunk: pa.Table) -> dict[str, Numbers]:
    """What request views' expressions may speak of, as a request sees it: stored values are float32 by then."""
    columns: dict[str, Numbers] = {}
    for view in wanted.views:
        for at, (column, default) in enumerate(zip(view.columns, view.defaults, strict=True)):
            null = found[view.name].null[:, at]
            with np.errstate(over="ignore"):
                values = found[view.name].values[:, at].astype(np.float32).astype(np.float64)
            if default is not None:
                values, null = np.where(null, np.float64(np.float32(default)), values), np.zeros_like(null)
            columns[f"{view.name}.{column}"] = values, null
    for name in {name for view in wanted.request_views for name in view.inputs}:
        numbers = pc.cast(chunk[name], pa.float64())
        null = np.asarray(numbers.is_null().to_numpy(), dtype=bool)
        columns[f"input.{name}"] = np.asarray(numbers.fill_null(0.0).to_numpy(), dtype=np.float64), null
    return columns


def _float32(values: NDArray[np.float64], null: NDArray[np.bool_], default: float | None) -> pa.Array:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if default is None:
        return pa.array(narrow, mask=null)
    return pa.array(np.where(null, np.float32(default), narrow))


def _open(labels: Labels) -> tuple[pyarrow.dataset.Dataset, int]:
    """The label files, and their bytes."""
    fs, path = fsspec.core.url_to_fs(labels.path)
    try:
        files = sorted(fs.find(path)) if fs.isdir(path) else [path]
        csv = files and all(file.endswith((".csv", ".csv.gz")) for file in files)
        dataset = pyarrow.dataset.dataset(files, filesystem=fs, format="csv" if csv else "parquet")
        return dataset, sum(int(fs.size(file)) for file in files)
    except (OSError, pa.ArrowException) as error:
        raise LabelsError(f"labels {labels.path}: cannot be read as Parquet or CSV: {error}") from error


def _check(labels: Labels, wanted: Wanted, schema: pa.Schema) -> None:
    needed = {labels.time: "the moments"}
    needed |= {labels.column_of(view.entity): f"the ids of entity {view.entity!r}" for view in wanted.views}
    needed |= {name: f"an input of view {view.name!r}" for view in wanted.request_views for name in view.inputs}
    for column, purpose in needed.items():
        if column not in schema.names:
            there = ", ".join(schema.names)
            raise LabelsError(f"labels {labels.path}: there is no column {column!r} for {purpose}; there are: {there}")
    if not (pa.types.is_timestamp(schema.field(labels.time).type) or schema.field(labels.time).type == pa.int64()):
        kind = schema.field(labels.time).type
        raise LabelsError(
            f"labels {labels.path}, column {labels.time!r}: must be a timestamp or int64 microseconds, got {kind}"
        )
    for name in wanted.columns:
        if name in schema.names:
            raise LabelsError(f"labels {labels.path}: column {name!r} has the name of a feature")


def _chunks(dataset: pyarrow.dataset.Dataset, chunk_rows: int) -> Iterator[pa.Table]:
    """The rows in order, `chunk_rows` at a time; few batches are in memory."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in dataset.to_batches(batch_readahead=1, fragment_readahead=1):
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= chunk_rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, chunk_rows)
            rest = table.slice(chunk_rows)
            waiting, rows = rest.to_batches(), rest.num_rows
    if rows:
        yield pa.Table.from_batches(waiting)


def _moments(labels: Labels, chunk: pa.Table) -> NDArray[np.int64]:
    """Microseconds since 1970 UTC, (n,). Raises LabelsError at a null."""
    column = chunk[labels.time]
    if column.null_count:
        raise LabelsError(f"labels {labels.path}, column {labels.time!r}: a moment is null, and every label needs one")
    if pa.types.is_timestamp(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False), pa.int64())
    return np.asarray(column.to_numpy(), dtype=np.int64)
