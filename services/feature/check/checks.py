"""Whether batch, stream and request agree on a day; and whether a training set, or what was served, is the truth.

day        a day replayed by all three paths: SQL over files, tiles kept up to date event by event, and tiles
           made of everything at the moment of a request
training   a training set against the features as they were known at its moments: finds a leak
served     a sample of what was served against the features recomputed for the same moments
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from services.feature.check.served import Served, read
from services.feature.check.skew import ColumnSkew, compare
from services.feature.define.definition import DefinitionError, View
from services.feature.define.definitions import Definitions
from services.feature.define.events import Events, from_arrow, prepare
from services.feature.define.rows import Computed
from services.feature.offline.parts import Parts
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online.packed import EXPIRED, MISSING, OK
from services.feature.tiles.kernel import ViewKernel

STREAM, REQUEST, TRAINING, SERVED = "stream", "request", "training set", "served"
_DAY_US = 86_400_000_000
_ROWS, _ENTITIES = 1_000, 100
_REQUESTS = 200  # each builds a state from all that went before

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
    def agrees(self) -> bool:
        return not any(column.mismatched for column in self.columns)


@dataclass(frozen=True, slots=True)
class Sample:
    """Moments of one day to compare at: (entity, moment) pairs in the order of time."""

    entity_ids: Sequence[str]
    as_of_us: NDArray[np.int64]


def day(
    offline: OfflineStore,
    views: Sequence[View],
    which: date,
    *,
    rows: int = _ROWS,
    seed: int = 0,
    progress: Progress = lambda _what, _share: None,
) -> list[Checked]:
    """Replays one day, UTC, of every view at about `rows` moments around the events of some entities.

    The moments are those of the day's events, a microsecond after them, and others in between; some lie on the borders
    of windows. Batch is the SQL on the files as of each moment.
    """
    begin_us = int(datetime(which.year, which.month, which.day, tzinfo=UTC).timestamp()) * 1_000_000
    found: dict[str, list[ColumnSkew]] = {STREAM: [], REQUEST: []}
    notes: list[str] = []
    for done, view in enumerate(views):
        progress(view.name, done / len(views))
        random = np.random.default_rng([seed, done])
        events = _events(offline, view, begin_us, random)
        sample = _sample(view, events, begin_us, rows, random)
        if not len(sample.as_of_us):
            notes.append(f"view {view.name!r}: nothing happened on {which.isoformat()}")
            continue
        batch = offline.compute(view, Spine(list(sample.entity_ids), sample.as_of_us))
        found[STREAM] += _compare(view, _streamed(view, events, sample, begin_us), batch)
        few = np.sort(random.permutation(len(sample.as_of_us))[:_REQUESTS])
        requested = _requested(view, events, Sample([sample.entity_ids[at] for at in few], sample.as_of_us[few]))
        found[REQUEST] += _compare(view, requested, _rows(batch, few))
    progress("done", 1.0)
    return [Checked(path, columns, notes) for path, columns in found.items()]


def training(
    offline: OfflineStore, definitions: Definitions, folder: str, *, rows: int = 5_000, seed: int = 0
) -> Checked:
    """Recomputes some rows of a training set by what was known at their moments, whatever clock it was joined by.

    Raises PartsError where the folder holds no training set, DefinitionError where a view is no longer defined.
    """
    facts, part_rows = Parts.read(folder)
    views = [definitions.view(name) for name in facts["views"]]
    notes = [
        f"view {view.name!r} has changed its meaning since"
        for view in views
        if view.fingerprint() != facts["views"][view.name]
    ]
    if facts["clock"] != "known":
        notes.append(f"the training set says of itself that it was joined by {facts['clock']} time")
    random = np.random.default_rng(seed)
    tables = []
    for name, count in part_rows.items():
        share = max(1, round(rows * count / max(1, sum(part_rows.values()))))
        tables.append(_some(f"{folder}/{name}.parquet", min(share, count), random))
    table = pa.concat_tables(tables)
    moments = _moments(table[facts["time"]])
    columns: list[ColumnSkew] = []
    for view in views:
        ids = pc.cast(table[facts["entities"][view.entity]], pa.string()).combine_chunks()
        truth = _with_defaults(view, offline.compute(view, Spine(ids, moments)))
        given = [table[f"{view.name}.{column}"].combine_chunks() for column in view.columns]
        values = np.stack([np.asarray(one.fill_null(0.0).to_numpy(), np.float32) for one in given], axis=1)
        null = np.stack([one.is_null().to_numpy(zero_copy_only=False) for one in given], axis=1)
        columns += compare(view.name, view.columns, values, null, truth)
    return Checked(TRAINING, columns, notes)


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


def _events(offline: OfflineStore, view: View, begin_us: int, random: np.random.Generator) -> list[Events]:
    """All events of some entities that had one on the day, up to its end; one batch per source, in order."""
    active = offline.active(view, begin_us, begin_us + _DAY_US)
    chosen = sorted(active[at] for at in random.permutation(len(active))[:_ENTITIES])
    found = []
    for source in view.sources:
        table = offline.events(view, source, chosen, begin_us + _DAY_US)
        found.append(prepare(source, from_arrow(source, table)))
    return found


def _sample(view: View, events: Sequence[Events], begin_us: int, rows: int, random: np.random.Generator) -> Sample:
    """Moments on, just after and between the day's events, and on borders of steps."""
    pairs: set[tuple[int, str]] = set()
    steps = sorted({feature.step_us for feature in view.features if feature.step_us})
    candidates = [
        (entity_id, int(known_us))
        for batch in events
        for entity_id, known_us in zip(batch.entities[view.entity], batch.known_us, strict=True)
        if entity_id is not None and known_us >= begin_us
    ]
    for at in random.permutation(len(candidates))[: max(1, rows // 4)]:
        entity_id, known_us = candidates[at]
        later_us = int(known_us + random.integers(2, _DAY_US // 2))
        border_us = -(-known_us // steps[at % len(steps)]) * steps[at % len(steps)] if steps else known_us + 7
        for moment in (known_us, known_us + 1, border_us, later_us):
            if begin_us <= moment <= begin_us + _DAY_US:
                pairs.add((moment, entity_id))
    ordered = sorted(pairs)
    return Sample([entity_id for _, entity_id in ordered], np.array([moment for moment, _ in ordered], np.int64))


def _streamed(view: View, events: Sequence[Events], sample: Sample, begin_us: int) -> Computed:
    """States built from what was known before the day, then kept up to date batch by batch and read in between."""
    kernel = ViewKernel(view)
    states: dict[str, bytes | None] = dict.fromkeys(sample.entity_ids)
    orders = [np.lexsort((batch.sequence, batch.known_us)) for batch in events]
    times = [batch.known_us[order] for batch, order in zip(events, orders, strict=True)]
    done = [0] * len(events)

    def catch_up(moment_us: int) -> None:
        for number, (batch, order) in enumerate(zip(events, orders, strict=True)):
            upto = int(np.searchsorted(times[number], moment_us))
            if upto > done[number]:
                some = batch.take(order[done[number] : upto])
                for entity_id in kernel.entities(some):
                    states.setdefault(entity_id, None)
                states.update(kernel.apply(states, some, order_positions(done[number], upto)))
                done[number] = upto

    def order_positions(start: int, end: int) -> NDArray[np.int64]:
        return np.arange(start + 1, end + 1, dtype=np.int64)

    catch_up(begin_us)
    rows = []
    for moment, members in _moments_of(sample):
        catch_up(moment)
        rows.append(kernel.rows([states[member] for member in members], moment))
    return _stacked(rows)


def _requested(view: View, events: Sequence[Events], sample: Sample) -> Computed:
    """Each row from nothing but the events, as if there were no store."""
    kernel = ViewKernel(view)
    by_entity = [_places(batch, view.entity) for batch in events]
    rows = []
    for entity_id, moment in zip(sample.entity_ids, sample.as_of_us.tolist(), strict=True):
        states: dict[str, bytes | None] = {entity_id: None}
        for batch, places in zip(events, by_entity, strict=True):
            mine = places.get(entity_id, np.zeros(0, np.int64))
            some = batch.take(mine[batch.known_us[mine] < moment])
            if len(some):
                states |= kernel.apply(states, some)
        rows.append(kernel.rows([states[entity_id]], moment))
    return _stacked(rows)


def _places(events: Events, entity: str) -> dict[str, NDArray[np.int64]]:
    """Where each entity's events stand."""
    places: dict[str, list[int]] = {}
    for at, entity_id in enumerate(events.entities[entity]):
        if entity_id is not None:
            places.setdefault(entity_id, []).append(at)
    return {entity_id: np.array(some, np.int64) for entity_id, some in places.items()}


def _moments_of(sample: Sample) -> Iterator[tuple[int, Sequence[str]]]:
    """Every moment in order, with who is asked about at it."""
    moments, starts = np.unique(sample.as_of_us, return_index=True)
    ends = [*starts[1:].tolist(), len(sample.as_of_us)]
    for moment, start, end in zip(moments.tolist(), starts.tolist(), ends, strict=True):
        yield moment, sample.entity_ids[start:end]


def _stacked(rows: Sequence[Computed]) -> Computed:
    return Computed(
        np.concatenate([row.values for row in rows]),
        np.concatenate([row.null for row in rows]),
        np.concatenate([row.known for row in rows]),
    )


def _rows(computed: Computed, at: NDArray[np.int64]) -> Computed:
    return Computed(computed.values[at], computed.null[at], computed.known[at])


def _compare(view: View, given: Computed, truth: Computed) -> list[ColumnSkew]:
    return compare(view.name, view.columns, given.float32(), given.null, truth)


def _with_defaults(view: View, computed: Computed) -> Computed:
    """As a training set has it."""
    values, null = computed.values.copy(), computed.null.copy()
    for at, default in enumerate(view.defaults):
        if default is not None:
            values[null[:, at], at] = default
            null[:, at] = False
    return Computed(values, null, computed.known)


def _some(path: str, rows: int, random: np.random.Generator) -> pa.Table:
    fs, place = fsspec.core.url_to_fs(path)
    with fs.open(place, "rb") as file:
        table = pa.parquet.read_table(file)
    return table.take(np.sort(random.permutation(table.num_rows)[:rows]))


def _moments(column: Any) -> NDArray[np.int64]:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False), pa.int64())
    return np.asarray(column.to_numpy(), dtype=np.int64)


def as_json(checked: Sequence[Checked]) -> str:
    """One object: path -> columns and notes."""
    return json.dumps(
        {
            one.path: {
                "agrees": one.agrees,
                "columns": [_plain(column) for column in one.columns],
                "notes": list(one.notes),
            }
            for one in checked
        }
    )


def _plain(column: ColumnSkew) -> Mapping[str, Any]:
    numbers = {name: getattr(column, name) for name in ("rows", "mismatched", "share", "null_given", "null_expected")}
    return {"view": column.view, "column": column.column, **numbers, "worst": column.worst, "shift": column.shift}
