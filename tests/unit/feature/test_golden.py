"""Every aggregate on every path that runs in this process: the oracle, DuckDB, the portable SQL and the kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.feature.define.definition import Aggregate, View
from services.feature.define.events import prepare
from services.feature.define.rows import Computed
from services.feature.offline import sql
from services.feature.offline import store as offline_module
from services.feature.offline.store import OfflineStore
from services.feature.tiles.kernel import ViewKernel
from tests.unit.feature import golden
from tests.unit.feature.golden import ASKED, EVENTS, SOURCES, VIEW
from tests.unit.feature.oracle import Event, columns_of


def test_the_history_asks_for_every_aggregate() -> None:
    assert {feature.aggregate for feature in VIEW.features} == set(Aggregate)
    rows = golden.expected()
    assert rows.known.any()
    assert not rows.known.all()
    # each column has an answer somewhere, but that of the source that never spoke
    assert [column for column, null in zip(VIEW.columns, rows.null.all(axis=0), strict=True) if null] == ["level_max"]
    # both ways of estimating how many labels there are have their turn
    estimates = rows.values[:, VIEW.columns.index("badge_distinct")]
    assert 0 < estimates[estimates > 0].min() < 2.5 * 4096 < estimates.max()


def test_a_difference_is_seen() -> None:
    rows = golden.expected()
    off = Computed(rows.values * (1 + 1e-8), rows.null, rows.known)
    assert len(golden.differences(off)) > 100
    assert len(golden.differences(Computed(rows.values, ~rows.null, ~rows.known))) == len(ASKED) * (
        1 + len(VIEW.columns)
    )


@pytest.mark.parametrize("dialect", [sql.DUCKDB, sql.PORTABLE], ids=["own forms", "portable forms"])
def test_duckdb_says_what_the_contract_says(
    tmp_path: Path, dialect: sql.Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(view: View, relation_of: sql.RelationOf, clock: sql.Clock) -> sql.Program:
        return sql.program(view, relation_of, dialect, clock)

    monkeypatch.setattr(offline_module, "compile_program", program)
    golden.write(tmp_path)
    assert golden.differences(OfflineStore(tmp_path).compute(VIEW, golden.spine())) == []


@pytest.mark.parametrize("batch", [1_000_000, 7])
def test_the_kernel_says_what_the_contract_says(batch: int) -> None:
    """However the events come: all at once, or a few at a time and the latest first."""
    kernel, states, moments = ViewKernel(VIEW), [], []
    for entity, as_of_us in ASKED:
        states.append(_state(kernel, entity, as_of_us, batch))
        moments.append(as_of_us)
    assert golden.differences(kernel.rows(states, moments)) == []


def _state(kernel: ViewKernel, entity: str | None, as_of_us: int, batch: int) -> bytes | None:
    """Of what was known by then: a state is of no use for earlier moments."""
    states: dict[str, bytes | None] = {}
    for source in SOURCES:
        known = [e for e in EVENTS[source.name] if e.entities["driver"] == entity and e.known_us < as_of_us]
        for part in _parts(known, batch):
            events = prepare(source, columns_of(source.name, _plain(source.plain, part)))
            states |= kernel.apply({id_: states.get(id_) for id_ in kernel.entities(events)}, events)
    return states.get(entity) if entity is not None else None


def _parts(events: list[Event], batch: int) -> list[list[Event]]:
    if batch < len(events) <= 100:
        order = np.argsort([-e.known_us for e in events], kind="stable")
        events = [events[at] for at in order.tolist()]
        return [events[at : at + batch] for at in range(0, len(events), batch)]
    return [events] if events else []


def _plain(names: tuple[str, ...], events: list[Event]) -> list[Event]:
    """As they arrive: without the values that the product makes itself."""
    return [
        Event(e.sequence, e.known_us, e.event_us, e.entities, {name: e.values[name] for name in names}, e.labels)
        for e in events
    ]
