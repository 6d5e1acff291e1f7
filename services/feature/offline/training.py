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
import pyarrow.csv
import pyarrow.dataset
from numpy.typing import NDArray

from services.feature.define.definition import INPUT, RequestView, View
from services.feature.define.events import Numbers
from services.feature.define.rows import Computed
from services.feature.offline.parts import Parts
from services.feature.offline.store import Clock, OfflineStore, Spine

LATEST_US = 2**53
"""The last moment there is, in the year 2255: stores compare times as doubles."""
CHUNK_ROWS = 250_000
"""Labels that are joined at a time: with 150 features about 300 MB."""
_CSV = (".csv", ".csv.gz")

Progress = Callable[[int, int], None]
"""Told the rows that are done, and all of them."""
Known = Callable[[str, int, int], None]
"""Told a view, and of how many of how many labels something was known by their moment."""


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
    known: Known = lambda _view, _known, _all: None,
) -> Parts:
    """Writes the training set into the folder `out`, in parts; one that was cut off goes on where it stopped.

    known: told of every part that is made. Raises LabelsError, OfflineError or PartsError; parts that are whole stay.
    """
    dataset, size = _opened(labels, wanted)
    total = _rows(labels, dataset)
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
    progress(done, total)
    for number, chunk in enumerate(_chunks(labels, dataset, chunk_rows)):
        name, before, rows = f"part-{number:05d}", done, chunk.num_rows
        done += rows
        if parts.missing([name]):

            def told(view: str, count: int, share: float, before: int = before, rows: int = rows) -> None:
                known(view, count, rows)
                progress(before + round(share * rows), total)

            parts.write(name, join(offline, labels, wanted, chunk, told))
        progress(done, total)
    return parts


def examined(labels: Labels, wanted: Wanted) -> int:
    """How many rows the labels have. Raises LabelsError as `training_set` would."""
    dataset, _ = _opened(labels, wanted)
    return _rows(labels, dataset)


def join(
    offline: OfflineStore,
    labels: Labels,
    wanted: Wanted,
    chunk: pa.Table,
    told: Callable[[str, int, float], None] = lambda _view, _known, _share: None,
) -> pa.Table:
    """The same rows in the same order, with the features' columns after those that were there.

    told: of each view, how many rows something was known of, and the share of views that are done, 0 to 1.
    """
    moments = _moments(labels, chunk)
    known: dict[str, Numbers] = {}
    for done, view in enumerate(wanted.views, start=1):
        ids = pc.cast(chunk[labels.column_of(view.entity)], pa.string()).combine_chunks()
        computed = offline.compute(view, Spine(ids, moments), wanted.clock)
        known |= served_numbers(view, computed)
        told(view.name, int(computed.known.sum()), done / len(wanted.views))
    for name in {name for view in wanted.request_views for name in view.inputs}:
        known[f"{INPUT}.{name}"] = input_numbers(chunk[name])
    table = chunk
    for view in wanted.views:
        for column in view.columns:
            name = f"{view.name}.{column}"
            table = table.append_column(name, _float32(*known[name]))
    for request_view in wanted.request_views:
        expressions = request_view.expressions(wanted.views)
        for column, expression in zip(request_view.columns, expressions, strict=True):
            table = table.append_column(f"{request_view.name}.{column}", _float32(*expression.evaluate(known)))
    return table


def served_numbers(view: View, computed: Computed) -> dict[str, Numbers]:
    """Values as a reader gets them, by "<view>.<column>": no finer than float32, the default where it was null."""
    found: dict[str, Numbers] = {}
    with np.errstate(over="ignore"):
        served = computed.values.astype(np.float32)
    for at, (column, default) in enumerate(zip(view.columns, view.defaults, strict=True)):
        values, null = served[:, at].astype(np.float64), computed.null[:, at]
        if default is not None:
            values, null = np.where(null, np.float64(np.float32(default)), values), np.zeros_like(null)
        found[f"{view.name}.{column}"] = values, null
    return found


def input_numbers(column: pa.ChunkedArray) -> Numbers:
    """What a request would carry."""
    numbers = pc.cast(column, pa.float64())
    null = np.asarray(numbers.is_null().to_numpy(), dtype=bool)
    return np.asarray(numbers.fill_null(0.0).to_numpy(), dtype=np.float64), null


def _float32(values: NDArray[np.float64], null: NDArray[np.bool_]) -> pa.Array:
    with np.errstate(over="ignore"):
        return pa.array(values.astype(np.float32), mask=null)


def _opened(labels: Labels, wanted: Wanted) -> tuple[pyarrow.dataset.Dataset, int]:
    """The label files, checked, and their bytes. Raises LabelsError."""
    fs, path = fsspec.core.url_to_fs(labels.path)
    try:
        files = [path]
        if fs.isdir(path):
            files = [file for file in sorted(fs.find(path)) if file.endswith((".parquet", *_CSV))]
        if not (files and all(map(fs.exists, files))):
            what = (
                f"there is no {', '.join(('.parquet', *_CSV))} file in it" if files == [] else "there is no such file"
            )
            raise LabelsError(f"labels {labels.path}: {what}")
        kinds = {file.endswith(_CSV) for file in files}
        if len(kinds) > 1:
            raise LabelsError(f"labels {labels.path}: must be all Parquet or all CSV, got both")
        size = sum(int(fs.size(file)) for file in files)
        if not size:
            raise LabelsError(f"labels {labels.path}: must have at least 1 row, got an empty file")
        form = _csv(labels, wanted) if kinds == {True} else "parquet"
        dataset = pyarrow.dataset.dataset(files, filesystem=fs, format=form)
    except (OSError, pa.ArrowException) as error:
        raise LabelsError(f"labels {labels.path}: cannot be read as Parquet or CSV: {error}") from error
    if dataset.head(1).num_rows:
        _check(labels, wanted, dataset.schema)
    return dataset, size


def _csv(labels: Labels, wanted: Wanted) -> pyarrow.dataset.CsvFileFormat:
    """Ids are text, whatever they look like: 007 is not 7."""
    texts = {labels.column_of(view.entity): pa.string() for view in wanted.views}
    return pyarrow.dataset.CsvFileFormat(convert_options=pyarrow.csv.ConvertOptions(column_types=texts))


def _rows(labels: Labels, dataset: pyarrow.dataset.Dataset) -> int:
    """How many there are. Raises LabelsError where there are none, or a file cannot be read."""
    try:
        rows = int(dataset.count_rows())
    except (OSError, pa.ArrowException) as error:
        raise LabelsError(f"labels {labels.path}: cannot be read: {error}") from error
    if not rows:
        raise LabelsError(f"labels {labels.path}: must have at least 1 row, got 0")
    return rows


def _check(labels: Labels, wanted: Wanted, schema: pa.Schema) -> None:
    """Raises LabelsError naming the column."""
    about = dict.fromkeys(view.entity for view in wanted.views)
    if unknown := [entity for entity in labels.entities if entity not in about]:
        raise LabelsError(f"no view that is joined is about entity {unknown[0]!r}, they are about: {', '.join(about)}")
    needed = [(labels.time, "the moments", _is_moment, "a timestamp or int64 microseconds")]
    needed += [(labels.column_of(one), f"the ids of entity {one!r}", _is_id, "text or whole numbers") for one in about]
    needed += [
        (name, f"an input of view {view.name!r}", _is_number, "a number")
        for view in wanted.request_views
        for name in view.inputs
    ]
    for column, purpose, fits, allowed in needed:
        if (count := schema.names.count(column)) != 1:
            problem = f"there is no column {column!r}" if not count else f"there are {count} columns {column!r}"
            there = ", ".join(schema.names)
            raise LabelsError(f"labels {labels.path}: {problem} for {purpose}; there are: {there}")
        if not fits(schema.field(column).type):
            kind = schema.field(column).type
            raise LabelsError(f"labels {labels.path}, column {column!r}: must be {allowed}, got {kind}")
    for name in wanted.columns:
        if name in schema.names:
            raise LabelsError(f"labels {labels.path}: column {name!r} has the name of a feature")


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or kind == pa.int64())


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_id(kind.value_type)
    of = pa.types
    is_text = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    return bool(is_text or of.is_integer(kind) or of.is_null(kind))


def _is_number(kind: pa.DataType) -> bool:
    of = pa.types
    return bool(
        of.is_integer(kind) or of.is_floating(kind) or of.is_decimal(kind) or of.is_boolean(kind) or of.is_null(kind)
    )


def _chunks(labels: Labels, dataset: pyarrow.dataset.Dataset, chunk_rows: int) -> Iterator[pa.Table]:
    """The rows in order, `chunk_rows` at a time; few batches are in memory."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in _batches(labels, dataset):
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= chunk_rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, chunk_rows)
            rest = table.slice(chunk_rows)
            waiting, rows = rest.to_batches(), rest.num_rows
    if rows:
        yield pa.Table.from_batches(waiting)


def _batches(labels: Labels, dataset: pyarrow.dataset.Dataset) -> Iterator[pa.RecordBatch]:
    try:
        yield from dataset.to_batches(batch_readahead=1, fragment_readahead=1)
    except (OSError, pa.ArrowException) as error:
        raise LabelsError(f"labels {labels.path}: cannot be read: {error}") from error


def _moments(labels: Labels, chunk: pa.Table) -> NDArray[np.int64]:
    """Raises LabelsError at a null, and where a moment is none."""
    column = chunk[labels.time]
    if column.null_count:
        raise LabelsError(f"labels {labels.path}, column {labels.time!r}: a moment is null, and every label needs one")
    moments = moments_us(column)
    wrong = moments[(moments < 0) | (moments > LATEST_US)]
    if len(wrong):
        raise LabelsError(
            f"labels {labels.path}, column {labels.time!r}: a moment must be 0 to 2**53 microseconds since 1970, "
            f"got {wrong[0]}; are these seconds, milliseconds or nanoseconds?"
        )
    return moments


def moments_us(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Microseconds since 1970 UTC, (n,), of such numbers, or of timestamps: in UTC where they name no zone."""
    if pa.types.is_timestamp(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False), pa.int64())
    return np.asarray(column.to_numpy(), dtype=np.int64)
