"""The events, the labels and the right answers, as files that every arm reads.

    fv0_10x.parquet          entity_id, event_us, known_us, seq, 25 float32: one row per entity and snapshot
    feast_fv0_10x.parquet    the same rows with a timestamp for the integers, as Feast wants them
    labels_10x.parquet       label_id, entity_id, as_of_us, event_timestamp
    truth_10x.npy            float32 (labels, 50)
    truth_online.npy         float32 (entities, 50): after the last event of 1x

No entity has two events in one microsecond and no label falls on an event, so that engines with other rules for such
cases have the same answer.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loadtest.bench.feature_arms.sizes import (
    END_US,
    FEATURES,
    PER_VIEW,
    SNAPSHOTS,
    SPAN_S,
    START_US,
    VIEWS,
    VOLUMES,
    Sizes,
)
from loadtest.bench.feature_arms.truth import Floats, Ints, as_of

VERSION = 1  # of the files' contents
_ROW_GROUP = 131_072
_BESIDE_EVENTS_US = 500_000  # events fall on whole seconds and a few microseconds


def prepared(home: Path, sizes: Sizes) -> Path:
    """The folder of the files, made where it is absent."""
    folder = home / f"data-v{VERSION}-{sizes.entities}-{sizes.labels_1x}"
    if not folder.is_dir():
        making = folder.with_name(f"{folder.name}.{os.getpid()}")
        making.mkdir(parents=True)
        try:
            for volume in VOLUMES:
                _write(making, volume, sizes)
            making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder.resolve()


def _write(folder: Path, volume: str, sizes: Sizes) -> None:
    rng = np.random.default_rng([SNAPSHOTS[volume], sizes.entities])
    labels = sizes.labels(volume)
    asked = rng.integers(0, sizes.entities, labels)
    moment_us = START_US + rng.integers(SPAN_S // 2, SPAN_S, labels) * 1_000_000 + _BESIDE_EVENTS_US
    everyone = np.arange(sizes.entities, dtype=np.int64)
    at_labels: list[Floats] = []
    at_end: list[Floats] = []
    for view in VIEWS:
        entity, event_us, values = _events(rng, volume, sizes)
        _write_events(folder, view, volume, entity, event_us, values)
        at_labels.append(as_of(entity, event_us, values, asked, moment_us))
        at_end.append(as_of(entity, event_us, values, everyone, np.full(sizes.entities, END_US)))
    _write_labels(folder, volume, asked, moment_us)
    np.save(folder / f"truth_{volume}.npy", np.concatenate(at_labels, axis=1))
    if volume == "1x":
        np.save(folder / "truth_online.npy", np.concatenate(at_end, axis=1))


def _events(rng: np.random.Generator, volume: str, sizes: Sizes) -> tuple[Ints, Ints, Floats]:
    """Entity numbers, event times and values, one row per event."""
    snapshots = SNAPSHOTS[volume]
    n = sizes.entities * snapshots
    entity = np.tile(np.arange(sizes.entities, dtype=np.int64), snapshots)
    nth_snapshot = np.repeat(np.arange(snapshots, dtype=np.int64), sizes.entities)
    event_us = START_US + rng.integers(0, SPAN_S, n) * 1_000_000 + nth_snapshot
    return entity, event_us, rng.standard_normal((n, PER_VIEW), dtype=np.float32)


def _write_events(folder: Path, view: str, volume: str, entity: Ints, event_us: Ints, values: Floats) -> None:
    ids = pa.array(entity).cast(pa.string())
    times = pa.array(event_us)
    features = {name: pa.array(np.ascontiguousarray(values[:, i])) for i, name in enumerate(FEATURES[view])}
    seq = pa.array(np.arange(len(entity), dtype=np.int64))
    ours = pa.table({"entity_id": ids, "event_us": times, "known_us": times, "seq": seq, **features})
    feast = pa.table({"entity_id": ids, "event_timestamp": _timestamps(event_us), **features})
    pq.write_table(ours, folder / f"{view}_{volume}.parquet", row_group_size=_ROW_GROUP)
    pq.write_table(feast, folder / f"feast_{view}_{volume}.parquet", row_group_size=_ROW_GROUP)


def _write_labels(folder: Path, volume: str, asked: Ints, moment_us: Ints) -> None:
    columns = {
        "label_id": pa.array(np.arange(len(asked), dtype=np.int64)),
        "entity_id": pa.array(asked).cast(pa.string()),
        "as_of_us": pa.array(moment_us),
        "event_timestamp": _timestamps(moment_us),
    }
    pq.write_table(pa.table(columns), folder / f"labels_{volume}.parquet")


def _timestamps(us: Ints) -> pa.Array:
    return pa.array(us).cast(pa.timestamp("us", tz="UTC"))
