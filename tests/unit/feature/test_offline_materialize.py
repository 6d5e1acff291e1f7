from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.define.schema import ViewSchema
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online.materialize import Rows, in_chunks, materialize, rows_at

S = 1_000_000
TRIPS = Source("trips", "*.parquet", "known_us", "known_us", "seq", entities=("driver", "car"), values=("fare",))
VIEWS = [
    View(entity, entity, (*windowed(TRIPS, "fare", (Aggregate.MEAN,), ("1m",)), *latest(TRIPS, "fare")))
    for entity in ("driver", "car")
]


class Written:
    """An OnlineWriter that remembers, in order, what it was told."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.moments: set[int] = set()
        self.log: list[str] = []
        self.published: tuple[list[str], int, dict[str, int]] | None = None

    async def write(
        self, schema: ViewSchema, entity_ids: Sequence[str], event_us: int, values: NDArray[np.float32]
    ) -> int:
        self.rows.setdefault(schema.name, {}).update(zip(entity_ids, values.tolist(), strict=True))
        self.moments.add(event_us)
        self.log.append(schema.name)
        return len(entity_ids)

    async def publish(self, schemas: Sequence[ViewSchema], watermark_us: int, rows: Mapping[str, int]) -> None:
        self.published = ([schema.name for schema in schemas], watermark_us, dict(rows))
        self.log.append("published")


@pytest.fixture
def offline(tmp_path: Path) -> OfflineStore:
    table = pa.table({
        "driver": ["ann", "bob", None, "ann", "late"],
        "car": ["c1", "c1", "c2", "c1", "c1"],
        "known_us": [1 * S, 2 * S, 3 * S, 4 * S, 90 * S],
        "seq": [1, 2, 3, 4, 5],
        "fare": [1.0, 2.0, 3.0, 5.0, 9.0],
    })  # fmt: skip
    pa.parquet.write_table(table, tmp_path / "trips.parquet")
    return OfflineStore(tmp_path)


async def test_every_entity_known_by_the_moment_is_written_and_only_then_published(offline: OfflineStore) -> None:
    online = Written()
    counts = await materialize(offline, VIEWS, 10 * S, online)
    assert {view: set(rows) for view, rows in online.rows.items()} == {"driver": {"ann", "bob"}, "car": {"c1", "c2"}}
    assert online.rows["driver"]["ann"] == [3.0, 5.0, 6.0]
    assert online.moments == {10 * S}
    assert online.published == (["driver", "car"], 10 * S, {"driver": 2, "car": 2})
    assert counts == {"driver": 2, "car": 2}
    assert online.log[-1] == "published"
    assert online.log.count("published") == 1


async def test_what_is_written_is_what_training_would_have_seen_at_that_moment(offline: OfflineStore) -> None:
    (rows,) = rows_at(offline, VIEWS[0], 10 * S)
    seen = offline.compute(VIEWS[0], Spine(list(rows.entity_ids), np.full(2, 10 * S, dtype=np.int64))).float32()
    assert rows.values.tobytes() == seen.tobytes()


def test_rows_come_in_chunks_that_lose_none(offline: OfflineStore) -> None:
    chunks = list(rows_at(offline, VIEWS[0], 100 * S, chunk_rows=2))
    assert [list(chunk.entity_ids) for chunk in chunks] == [["ann", "bob"], ["late"]]
    assert [chunk.values.shape for chunk in chunks] == [(2, 3), (1, 3)]


def test_a_view_that_nothing_is_known_for_has_no_rows(offline: OfflineStore) -> None:
    assert list(rows_at(offline, VIEWS[0], 1 * S)) == []


def test_a_chunk_holds_at_least_one_row() -> None:
    rows = Rows(VIEWS[0].schema(), ["ann"], 1, np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        list(in_chunks(rows, 0))
