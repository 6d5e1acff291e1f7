"""Whether batch, stream and request agree on a day; and whether a training set, or what was served, is the truth.

day        a day replayed: SQL over files against tiles kept up to date event by event, against tiles made of everything
           at the moment of a request, and request views in SQL against row by row as they are served
training   a training set against the features as they were known at its moments: finds a leak
served     a sample of what was served against the features recomputed for the same moments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from services.feature.check import requested
from services.feature.check.replay import affordable, events_of, request_by_request, sampled, streamed
from services.feature.check.served import Served, read
from services.feature.check.skew import ColumnSkew, compare
from services.feature.define.definition import INPUT, DefinitionError, RequestView, View
from services.feature.define.definitions import Definitions
from services.feature.define.events import Numbers
from services.feature.define.rows import Computed
from services.feature.offline.parts import Parts, PartsError
from services.feature.offline.store import OfflineStore, Spine
from services.feature.offline.training import input_numbers, moments_us, served_numbers
from services.feature.online.packed import EXPIRED, MISSING, OK

STREAM, REQUEST, ON_REQUEST, TRAINING, SERVED = "stream", "request", "on request", "training set", "served"
_ROWS = 1_000
_REQUESTS = 200  # each builds a state from all that went before
_MADE_UP = 500  # rows of a request view; each is worked out alone

Progress = Callable[[str, float], None]
"""Told what is being checked, and the share that is done, 0 to 1."""


class Checked(NamedTuple):
    """path: what was compared with the events, recomputed in SQL. columns: one entry per feature.

    notes: what was left out, and why.
    """

    path: str
    columns: Sequence[ColumnSkew]
    notes: Sequence[str] = ()

    @property
    def rows(self) -> int:
        """Of the feature that was compared most often."""
        return max((column.rows for column in self.columns), default=0)

    @property
    def agrees(self) -> bool:
        """False too where nothing was compared: that proves nothing."""
        return self.rows > 0 and not any(column.mismatched for column in self.columns)


def day(
    offline: OfflineStore,
    views: Sequence[View],
    which: date,
    request_views: Sequence[RequestView] = (),
    *,
    rows: int = _ROWS,
    seed: int = 0,
    progress: Progress = lambda _what, _share: None,
) -> list[Checked]:
    """Replays one day, UTC, of every view at about `rows` moments of some entities that had events on it.

    Half of the moments are on, just after and between the day's events, half where an event is about to leave a window
    and where it just did. Batch is the SQL on the files as of each moment.
    request_views: of what these read, `views` must hold all.
    """
    begin_us = int(datetime(which.year, which.month, which.day, tzinfo=UTC).timestamp()) * 1_000_000
    found: dict[str, list[ColumnSkew]] = {STREAM: [], REQUEST: []}
    notes: list[str] = []
    known: dict[str, Computed] = {}
    for done, view in enumerate(views):
        progress(f"{view.name}: reading", done / len(views))
        random = np.random.default_rng([seed, done])
        events = events_of(offline, view, begin_us, random)
        sample = sampled(view, events, begin_us, rows, random)
        if not len(sample):
            notes.append(f"view {view.name!r}: nothing happened on {which.isoformat()}")
            continue
        progress(f"{view.name}: batch", (done + 0.25) / len(views))
        batch = known[view.name] = offline.compute(view, Spine(list(sample.entity_ids), sample.as_of_us))
        progress(f"{view.name}: stream", (done + 0.5) / len(views))
        found[STREAM] += _compare(view, streamed(view, events, sample, begin_us), batch)
        progress(f"{view.name}: request", (done + 0.75) / len(views))
        few = np.sort(random.permutation(len(sample))[: affordable(events, view.entity, _REQUESTS)])
        found[REQUEST] += _compare(view, request_by_request(view, events, sample.take(few)), _taken(batch, few))
    checked = [Checked(path, columns, notes) for path, columns in found.items()]
    if request_views:
        progress("features on request", 1.0)
        checked.append(_on_request(request_views, views, known, seed))
    progress("done", 1.0)
    return checked


def _on_request(
    request_views: Sequence[RequestView], views: Sequence[View], known: Mapping[str, Computed], seed: int
) -> Checked:
    """Made-up requests over rows that there were: row by row as they are served, against SQL.

    known: view -> rows.
    """
    columns: list[ColumnSkew] = []
    notes: list[str] = []
    for number, view in enumerate(request_views):
        if lacking := sorted(requested.reads(view, views) - known.keys()):
            notes.append(f"request view {view.name!r}: there are no rows of {', '.join(lacking)}, which it reads")
            continue
        asked = requested.made_up(view, views, known, _MADE_UP, np.random.default_rng([seed, number]))
        values, null = requested.row_by_row(view, views, asked, _MADE_UP)
        columns += compare(view.name, view.columns, values, null, requested.in_sql(view, views, asked))
    return Checked(ON_REQUEST, columns, notes)


def training(
    offline: OfflineStore,
    definitions: Definitions,
    folder: str,
    *,
    rows: int = 5_000,
    seed: int = 0,
    progress: Progress = lambda _what, _share: None,
) -> Checked:
    """Recomputes some rows of a training set by what was known at their moments, whatever clock it was joined by.

    Request views are worked out in SQL from the columns beside them. Raises PartsError where the folder holds no
    training set, DefinitionError where a view is no longer defined.
    """
    facts, part_rows = Parts.read(folder)
    if "labels" not in facts:
        raise PartsError(f"{folder} holds no training set but {', '.join(facts)}")
    views = [definitions.view(name) for name in facts["views"]]
    request_views = [definitions.request_view(name) for name in facts.get("request_views", ())]
    notes = _changes(facts, views, request_views)
    progress("training set: reading", 0.0)
    table = _some_rows(folder, part_rows, rows, np.random.default_rng(seed))
    moments = moments_us(table[facts["time"]])
    every: Sequence[View | RequestView] = (*views, *request_views)
    given = {name: _nullable(table[name]) for view in every for name in _names(view)}
    columns: list[ColumnSkew] = []
    for done, view in enumerate(views):
        progress(f"training set: {view.name}", done / len(views))
        ids = pc.cast(table[facts["entities"][view.entity]], pa.string()).combine_chunks()
        truth = served_numbers(view, offline.compute(view, Spine(ids, moments)))
        columns += _compared(view, given, _computed(view, truth))
    for asked in request_views:
        read = {name: given[name] for view in views for name in _names(view)}
        read |= {f"{INPUT}.{name}": input_numbers(table[name]) for name in asked.inputs}
        columns += _compared(asked, given, requested.in_sql(asked, views, read))
    return Checked(TRAINING, columns, notes)


def _changes(facts: Mapping[str, Any], views: Sequence[View], request_views: Sequence[RequestView]) -> list[str]:
    """What a training set was made from, where that is not what is defined now, or not what was known."""
    notes = [
        f"view {v.name!r} has changed its meaning since" for v in views if v.fingerprint() != facts["views"][v.name]
    ]
    notes += [
        f"request view {view.name!r} has changed its meaning since"
        for view in request_views
        if [[one.name, one.expression] for one in view.features] != facts["request_views"][view.name]
    ]
    if facts["clock"] != "known":
        notes.append(f"the training set says of itself that it was joined by {facts['clock']} time")
    return notes


def _some_rows(folder: str, part_rows: Mapping[str, int], rows: int, random: np.random.Generator) -> pa.Table:
    """About so many rows, of every part its share."""
    total = max(1, sum(part_rows.values()))
    shares = {name: min(count, max(1, round(rows * count / total))) for name, count in part_rows.items()}
    return pa.concat_tables([_some(f"{folder}/{name}.parquet", share, random) for name, share in shares.items()])


def _nullable(column: pa.ChunkedArray) -> Numbers:
    null = np.asarray(column.is_null().to_numpy(), dtype=bool)
    return np.asarray(column.fill_null(0.0).to_numpy(), dtype=np.float64), null


def _names(view: View | RequestView) -> list[str]:
    return [f"{view.name}.{column}" for column in view.columns]


def _computed(view: View, numbers: Mapping[str, Numbers]) -> Computed:
    values = np.stack([numbers[name][0] for name in _names(view)], axis=1)
    null = np.stack([numbers[name][1] for name in _names(view)], axis=1)
    return Computed(values, null, np.ones(len(values), bool))


def _compared(view: View | RequestView, given: Mapping[str, Numbers], truth: Computed) -> list[ColumnSkew]:
    values = np.stack([given[name][0] for name in _names(view)], axis=1)
    null = np.stack([given[name][1] for name in _names(view)], axis=1)
    return compare(view.name, view.columns, values.astype(np.float32), null, truth)


def served(offline: OfflineStore, definitions: Definitions, folder: Path, *, most_rows: int = 20_000) -> Checked:
    """Recomputes what was served: rows of a materialisation as of its watermark, streamed rows as of the request.

    A row that is missing or expired is not compared but counted in the notes; one that is missing although its entity
    was known is a mismatch.
    """
    records: dict[str, list[Served]] = {}
    taken = 0
    for record in read(folder):
        if taken < most_rows:
            records.setdefault(record.view, []).append(record)
            taken += len(record.entity_ids)
    columns: list[ColumnSkew] = []
    notes = [] if records else [f"{folder} holds no served rows"]
    for name, some in records.items():
        try:
            view = definitions.view(name)
        except DefinitionError:
            notes.append(f"view {name!r} was served but is not defined")
            continue
        skews, told = _served_view(offline, view, some)
        columns += skews
        notes += told
    return Checked(SERVED, columns, notes)


def _served_view(
    offline: OfflineStore, view: View, records: Sequence[Served]
) -> tuple[Sequence[ColumnSkew], Sequence[str]]:
    schema, width = view.schema(), len(view.columns)
    known = [record for record in records if record.schema_hash == schema.schema_hash]
    notes = []
    if len(known) < len(records):
        notes.append(f"view {view.name!r}: {len(records) - len(known)} records are of another schema; left out")
    if not known:
        return [], notes
    ids = [entity_id for record in known for entity_id in record.entity_ids]
    event_us = np.concatenate([np.frombuffer(record.event_us, "<i8") for record in known])
    asked_us = np.concatenate([np.array(record.as_of_us, np.int64) for record in known])
    values = np.frombuffer(b"".join(record.values for record in known), "<f4").reshape(-1, width)
    status = np.frombuffer(b"".join(record.status for record in known), np.uint8).reshape(-1, width)
    row = status[:, 0]
    fresh = row != EXPIRED
    notes += [f"view {view.name!r}: {count} of {len(ids)} rows were expired"] if (count := int((~fresh).sum())) else []
    moments = asked_us if view.stream else np.where(event_us > 0, event_us, asked_us)
    truth = offline.compute(view, Spine([ids[at] for at in np.flatnonzero(fresh)], moments[fresh]))
    if missing := int((row[fresh] == MISSING).sum()):
        gone = int(((row[fresh] == MISSING) & truth.known).sum())
        notes.append(f"view {view.name!r}: {missing} of {len(ids)} rows were missing, {gone} of them known by then")
    null = status[fresh] != OK
    return compare(view.name, view.columns, values[fresh], null, truth), notes


def _taken(computed: Computed, at: NDArray[np.int64]) -> Computed:
    return Computed(computed.values[at], computed.null[at], computed.known[at])


def _compare(view: View, given: Computed, truth: Computed) -> list[ColumnSkew]:
    return compare(view.name, view.columns, given.float32(), given.null, truth)


def _some(path: str, rows: int, random: np.random.Generator) -> pa.Table:
    fs, place = fsspec.core.url_to_fs(path)
    with fs.open(place, "rb") as file:
        table = pa.parquet.read_table(file)
    return table.take(np.sort(random.permutation(table.num_rows)[:rows]))


def as_plain(checked: Sequence[Checked]) -> dict[str, Any]:
    """Path -> whether it agrees, its columns and notes, for machines."""
    return {
        one.path: {
            "agrees": one.agrees,
            "columns": [_plain(column) for column in one.columns],
            "notes": list(one.notes),
        }
        for one in checked
    }


def _plain(column: ColumnSkew) -> Mapping[str, Any]:
    numbers = {name: getattr(column, name) for name in ("rows", "mismatched", "share", "null_given", "null_expected")}
    return {"view": column.view, "column": column.column, **numbers, "worst": column.worst, "shift": column.shift}
