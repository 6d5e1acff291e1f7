from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from deploy.flights import dataset, evaluate, prepare, replay
from deploy.flights.data import ENTITIES, INPUTS
from deploy.flights.views import VIEWS
from services.feature.define.schema import ViewSchema
from services.feature.offline.store import OfflineStore, Spine

ARTEFACTS = [
    "models/flight_delay_linear/1/model.onnx",
    "models/flight_delay_small/1/model.onnx",
    "models/flight_delay_full/1/model.onnx",
    "fallback/flight_delay_request.onnx",
    "fallback/flight_delay_prior.json",
]
WriteEvents = Callable[[Path], None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_some_events: WriteEvents) -> prepare.Prepared:
    return prepare.prepare(tmp_path_factory.mktemp("home"), write_events=write_some_events)


@pytest.fixture(scope="module")
def home(prepared: prepare.Prepared) -> Path:
    return prepared.folder.parent


def columns_of(path: Path) -> list[str]:
    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return [str(column) for column in json.loads(props["tenfold.columns"])]


def refuse(folder: Path) -> None:
    raise AssertionError(f"everything was there already, {folder} should not be written")


def test_a_second_run_makes_nothing(home: Path) -> None:
    again = prepare.prepare(home, write_events=refuse)
    assert not again.built
    assert again.evaluation["test_flights"] > 0


def test_a_lost_file_and_another_definition_are_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = home / "flights" / ARTEFACTS[0]
    content = lost.read_bytes()
    lost.unlink()
    try:
        with pytest.raises(AssertionError, match="should not be written"):
            prepare.prepare(home, write_events=refuse)
    finally:
        lost.write_bytes(content)
    monkeypatch.setattr(prepare, "inputs_hash", lambda: "another")
    with pytest.raises(AssertionError, match="should not be written"):
        prepare.prepare(home, write_events=refuse)


def test_a_build_that_fails_leaves_what_was_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (home / "flights" / name).read_bytes() for name in ARTEFACTS}
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "inputs_hash", lambda: "another")
        with pytest.raises(AssertionError):
            prepare.prepare(home, write_events=refuse)
    assert {name: (home / "flights" / name).read_bytes() for name in ARTEFACTS} == before
    assert not prepare.prepare(home, write_events=refuse).built


def test_two_builds_make_the_same_bytes_and_progress_only_grows(
    home: Path, tmp_path: Path, write_some_events: WriteEvents
) -> None:
    told: list[tuple[str, float]] = []
    prepare.prepare(tmp_path, lambda what, share: told.append((what, share)), write_some_events)
    for name in ARTEFACTS:
        assert (home / "flights" / name).read_bytes() == (tmp_path / "flights" / name).read_bytes(), name
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[0][1] == 0.0
    assert told[-1] == ("ready", 1.0)
    assert list(dict.fromkeys(what for what, _ in told))[:3] == ["events", "features", "models"]


def test_models_read_only_columns_that_exist_and_fallback_only_the_request(home: Path) -> None:
    stored = {f"{view.name}.{column}" for view in VIEWS for column in view.columns}
    request = {f"input.{name}" for name in INPUTS}
    for name in ARTEFACTS[:4]:
        columns = columns_of(home / "flights" / name)
        rest = [c for c in columns if c not in stored and c not in request]
        assert all(column.startswith("entity.") for column in rest), name
        assert len(set(columns)) == len(columns)
        assert bool(stored & set(columns)) is name.startswith("models/")
    assert stored < set(columns_of(home / "flights" / ARTEFACTS[2]))


def test_a_board_is_in_the_order_of_its_predictions_and_even_over_the_held_out_months(home: Path) -> None:
    board = replay.board(home, 40, seed=3)
    moments = [flight.predict_at_us for flight in board.flights]
    assert moments == sorted(moments)
    assert len({flight.flight_id for flight in board.flights}) == 40
    assert all(moment >= replay.BASE_MOMENT_US for moment in moments)
    for flight in board.flights:
        assert set(flight.entities) == set(ENTITIES)
        assert all(flight.entities.values())
        assert set(flight.inputs) == set(INPUTS)
    assert {flight.label for flight in board.flights} == {0, 1}
    assert board.flights == replay.board(home, 40, seed=3).flights
    assert board.flights != replay.board(home, 40, seed=4).flights


def test_a_boards_rows_are_what_compute_says_of_their_entities_at_that_moment(home: Path) -> None:
    board, store = replay.board(home, 15), OfflineStore(home / "flights" / "offline")
    by_name = {view.name: view for view in VIEWS}
    rows = [(flight, row) for flight, rows in zip(board.flights, board.writes, strict=True) for row in rows]
    assert {row.schema.name for _, row in rows} == set(by_name)
    for name, view in by_name.items():
        mine = [(flight, row) for flight, row in rows if row.schema.name == name]
        assert all(row.entity_id == flight.entities[view.entity] for flight, row in mine)
        assert all(row.event_us == flight.predict_at_us for flight, row in mine)
        moments = np.array([row.event_us for _, row in mine], dtype=np.int64)
        expected = store.compute(view, Spine([row.entity_id for _, row in mine], moments)).float32()
        assert np.array([row.values for _, row in mine]).tobytes() == expected.tobytes()


def test_a_replayed_flight_is_answered_as_the_evaluation_answered_it(home: Path) -> None:
    """The path of a request: stored rows and request, gathered by the graph's columns."""
    graph = home / "flights" / ARTEFACTS[2]
    columns, board = columns_of(graph), replay.board(home, 15)
    gathered = np.full((15, len(columns)), np.nan, dtype=np.float32)
    for row, flight, writes in zip(gathered, board.flights, board.writes, strict=True):
        known = {f"input.{name}": value for name, value in flight.inputs.items()}
        for write in writes:
            known |= {f"{write.schema.name}.{c}": v for c, v in zip(write.schema.columns, write.values, strict=True)}
        for at, column in enumerate(columns):
            entity, _, wanted = column.removeprefix("entity.").partition("=")
            row[at] = flight.entities[entity] == wanted if wanted else known.get(column, np.nan)
    made = dataset.build(home / "flights" / "offline")
    ids = made.flights["flight_id"].to_pylist()
    trained_like = made.values(columns, np.isin(ids, [flight.flight_id for flight in board.flights]))
    order = np.argsort([flight.flight_id for flight in board.flights])
    assert gathered[order].tobytes() == trained_like.tobytes()
    assert np.isfinite(evaluate.run(graph.read_bytes(), gathered)).all()


@pytest.mark.parametrize("n", [0, 1_000_000])
def test_a_board_of_no_or_too_many_flights_is_refused(home: Path, n: int) -> None:
    with pytest.raises(ValueError, match=rf"n must be 1 to \d+, got {n}"):
        replay.board(home, n)


def test_the_next_departure_is_the_first_scheduled_after_the_moment(home: Path) -> None:
    first = replay.board(home, 1).flights[0]
    again = replay.next_departure(home, first.designator, first.predict_at_us)
    assert again == first
    after = replay.next_departure(home, first.designator, first.predict_at_us + 7_200_000_000)
    assert after is None or after.predict_at_us > first.predict_at_us
    assert replay.next_departure(home, "XX0", 0) is None


class Store:
    """An OnlineWriter that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.published: dict[str, int] = {}

    async def write(
        self, schema: ViewSchema, entity_ids: Sequence[str], event_us: int, values: NDArray[np.float32]
    ) -> int:
        assert event_us == replay.BASE_MOMENT_US
        self.rows.setdefault(schema.name, {}).update(zip(entity_ids, values, strict=True))
        return len(entity_ids)

    async def publish(self, schemas: Sequence[ViewSchema], watermark_us: int, rows: Mapping[str, int]) -> None:
        assert [schema.schema_hash for schema in schemas] == [view.schema().schema_hash for view in VIEWS]
        assert watermark_us == replay.BASE_MOMENT_US
        self.published = dict(rows)


async def test_the_store_is_filled_with_every_entity_as_of_the_base_moment(home: Path) -> None:
    online, offline = Store(), OfflineStore(home / "flights" / "offline")
    written = await replay.fill(home, online)
    assert online.published == written == {view.name: len(online.rows[view.name]) for view in VIEWS}
    for view in VIEWS:
        ids = offline.entity_ids(view, replay.BASE_MOMENT_US)
        assert list(online.rows[view.name]) == ids
        moments = np.full(len(ids), replay.BASE_MOMENT_US, dtype=np.int64)
        assert (
            np.array(list(online.rows[view.name].values())).tobytes()
            == offline.compute(view, Spine(ids, moments)).float32().tobytes()
        )
