"""The commands over a real Valkey: what they store is what they then tell."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from services.feature.commands.app import commands
from services.feature.commands.moments import moment_us
from services.feature.commands.place import Place
from services.feature.commands.reach import Reached, reach
from services.feature.define.definitions import load
from services.feature.offline.store import OfflineStore
from services.feature.online import loading
from services.feature.online.store import OnlineStore
from services.resilience.errors import Unavailable

S = 1_000_000
T = TypeVar("T")
DEFINITIONS = """
from services.feature.define.definition import Aggregate, Source, View, latest, windowed

TRIPS = Source("trips", "trips/*.parquet", "at_us", "at_us", "seq", entities=("driver", "car"), values=("fare",))
VIEWS = (
    View("driver", "driver", (*windowed(TRIPS, "fare", (Aggregate.COUNT, Aggregate.MEAN), ("1h",)),
                              *latest(TRIPS, "fare")), ttl_s=3600.0),
    View("car", "car", windowed(TRIPS, "fare", (Aggregate.SUM,), ("1h",), default=-1.0), stream=True),
)
"""
NOW = time.time_ns() // 1000


@pytest.fixture
def place(tmp_path: Path, valkey: str) -> Place:
    """Three drivers, one of them with a fare that is not known; two cars."""
    (tmp_path / "events" / "trips").mkdir(parents=True)
    table = pa.table(
        {
            "driver": ["ann", "bob", "ann", "cyd"],
            "car": ["c1", "c2", "c1", "c2"],
            "at_us": [NOW - 600 * S, NOW - 500 * S, NOW - 400 * S, NOW - 300 * S],
            "seq": [1, 2, 3, 4],
            "fare": pa.array([1.0, 2.0, 4.0, None], pa.float64()),
        }
    )
    pa.parquet.write_table(table, tmp_path / "events" / "trips" / "a.parquet")
    (tmp_path / "views.py").write_text(DEFINITIONS)
    return Place("taxis", str(tmp_path / "views.py"), str(tmp_path / "events"), valkey)


def run(place: Place, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(commands(lambda _mesh, _stack: place), list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def told(place: Place, *arguments: str) -> dict[str, Any]:
    """What a command that succeeds tells, by view."""
    status, out, error = run(place, *arguments, "--json")
    assert status == 0, error
    assert out.count("\n") == 1
    return {one["view"]: one for one in json.loads(out)["views"]}


def with_store(place: Place, use: Callable[[Reached], Awaitable[T]]) -> T:
    async def within() -> T:
        async with reach(place.store, place.mesh) as reached:
            return await use(reached)

    return asyncio.run(within())


async def keys(reached: Reached) -> list[str]:
    return sorted([key async for some in reached.store.keys(5.0) for key in some])


def cells(row: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    return {cell["column"]: (cell["value"], cell["status"]) for cell in row["cells"]}


def test_a_dry_run_says_what_is_new_and_writes_nothing(place: Place) -> None:
    found = told(place, "materialize", "--dry-run")
    assert (found["driver"]["change"], found["driver"]["entities"], found["driver"]["next_generation"]) == ("new", 3, 1)
    assert (found["car"]["kind"], found["car"]["entities"], found["car"]["bytes"]) == ("state", 2, None)
    assert with_store(place, keys) == []


def test_what_is_materialised_is_shown_counted_and_then_unchanged(place: Place) -> None:
    expected = told(place, "plan")["driver"]["bytes"]
    done = told(place, "materialize")
    assert (done["driver"]["rows"], done["driver"]["verified"], done["driver"]["generation"]) == (3, 3, 1)
    assert (done["car"]["kind"], done["car"]["rows"]) == ("state", 2)

    shown = told(place, "show", "ann")
    assert shown["driver"]["found"]
    assert not shown["car"]["found"]
    row = cells(shown["driver"])
    assert row["fare_count_1h"] == (2.0, "OK")
    assert row["fare_mean_1h"] == (2.5, "OK")
    assert row["fare_last"] == (4.0, "OK")
    assert cells(told(place, "show", "cyd")["driver"])["fare_last"] == (None, "NULL")
    assert cells(told(place, "show", "nobody")["driver"])["fare_last"] == (None, "MISSING")

    car = told(place, "show", "c1", "--view", "car")["car"]
    assert (car["event_us"], cells(car)) == (NOW - 400 * S, {"fare_sum_1h": (5.0, "OK")})
    missing = told(place, "show", "c9", "--view", "car")["car"]
    assert cells(missing) == {"fare_sum_1h": (-1.0, "MISSING")}

    found = told(place, "stats")
    driver = found["driver"]
    assert (driver["rows"], driver["sampled"], driver["bytes"], driver["expired"]) == (3, 3, expected, 0.0)
    last = next(column for column in driver["columns"] if column["column"] == "fare_last")
    assert (last["null"], last["p50"]) == (pytest.approx(1 / 3), 3.0)
    assert (found["car"]["sampled"], found["car"]["columns"][0]["p50"]) == (2, 3.5)

    plan = told(place, "plan")
    assert {one["change"] for one in plan.values()} == {"unchanged"}
    assert plan["car"]["bytes"] > 0


def test_rows_of_a_moment_long_ago_are_expired_and_still_counted(place: Place) -> None:
    told(place, "materialize", "--view", "driver", "--at", str(NOW - 450 * S))
    before = told(place, "stats")["driver"]
    assert (before["rows"], before["expired"]) == (2, 0.0)
    Path(place.definitions).write_text(DEFINITIONS.replace("3600.0", "60.0"))
    told(place, "materialize", "--view", "driver", "--at", str(NOW - 450 * S), "--grace", "0")
    after = told(place, "stats")["driver"]
    assert after["expired"] == 1.0
    assert next(column for column in after["columns"] if column["column"] == "fare_last")["p50"] == 1.5
    assert cells(told(place, "show", "ann")["driver"])["fare_last"] == (1.0, "EXPIRED")


def test_a_changed_meaning_is_planned_loaded_and_what_it_replaces_removed(place: Place) -> None:
    told(place, "materialize", "--view", "driver")
    first = with_store(place, keys)
    Path(place.definitions).write_text(DEFINITIONS.replace('"trips/*.parquet"', '"trips/a*.parquet"'))
    assert told(place, "plan")["driver"]["change"] == "meaning changed"
    done = told(place, "materialize", "--view", "driver", "--grace", "0")["driver"]
    assert (done["replaced"], done["removed"], done["generation"]) == (1, 3, 2)
    rows = {key for key in with_store(place, keys) if "{" in key}
    assert len(rows) == 3
    assert rows.isdisjoint(first)
    assert told(place, "plan")["driver"]["change"] == "unchanged"


def test_without_retiring_readers_of_the_rows_before_keep_them(place: Place) -> None:
    for _ in range(2):
        told(place, "materialize", "--view", "driver", "--no-retire")
    assert len([key for key in with_store(place, keys) if "{" in key]) == 6


def test_a_view_that_is_no_longer_defined_is_told_and_can_still_be_looked_at(place: Place) -> None:
    told(place, "materialize", "--grace", "0")
    file = Path(place.definitions)
    file.write_text(DEFINITIONS.replace('View("driver"', 'View("pilot"').replace('View("car"', 'View("cab"'))
    plan = told(place, "plan")
    assert {view: one["change"] for view, one in plan.items()} == {
        "pilot": "new",
        "cab": "new",
        "car": "no longer defined",
        "driver": "no longer defined",
    }
    assert cells(told(place, "show", "ann")["driver"])["fare_last"] == (4.0, "OK")
    found = told(place, "stats")
    assert found["driver"]["columns"]
    assert (found["car"]["columns"], found["car"]["sampled"]) == ([], 2)
    assert "it is not defined any more" in found["car"]["note"]


def test_a_damaged_row_is_told_to_be_damaged(place: Place) -> None:
    told(place, "materialize", "--view", "driver")

    async def damage(reached: Reached) -> None:
        await reached.table.load([f"{reached.store.key_prefix('driver', 1)}ann}}"], [b"tfr\x01 nonsense"], 5.0)

    with_store(place, damage)
    row = told(place, "show", "ann")["driver"]
    assert (row["found"], row["note"]) == (False, "what is stored is damaged or of another schema")
    assert told(place, "stats")["driver"]["unreadable"] == pytest.approx(1 / 3)


def test_a_view_that_is_not_published_is_refused_with_those_that_are(place: Place) -> None:
    told(place, "materialize", "--view", "driver")
    for command in (("show", "ann"), ("stats",)):
        status, out, error = run(place, *command, "--view", "nothere")
        assert (status, out) == (1, "")
        assert "view 'nothere' is not published; published are: driver" in error


def test_people_see_tables_and_pictures(place: Place) -> None:
    for command, expected in (
        (("materialize", "--view", "driver"), "- -> 1"),
        (("plan",), "unchanged"),
        (("show", "ann"), "fare_mean_1h"),
        (("stats", "--plot", "--view", "driver"), "age of what was counted last"),
        (("stats", "--plot", "--column", "fare_last"), "driver.fare_last, 2 of 2 values"),
    ):
        status, out, error = run(place, *command)
        assert status == 0, error
        assert expected in out


class Failing(OnlineStore):
    async def verify(self, *arguments: Any) -> int:
        raise Unavailable("the rows read back are not what was loaded")


def test_what_cannot_be_verified_is_neither_published_nor_left_behind(place: Place) -> None:
    view = load(place.definitions).view("driver")

    async def load_it(reached: Reached) -> None:
        store = Failing(reached.table, place.mesh)
        with pytest.raises(Unavailable, match="not what was loaded"):
            await loading.load(OfflineStore(place.offline), store, [view], NOW)
        assert await store.views() == []

    with_store(place, load_it)
    assert not [key for key in with_store(place, keys) if "{" in key]


@pytest.mark.parametrize("at_once", [1, 2, 0])
def test_however_rows_are_cut_each_is_loaded_once(place: Place, at_once: int) -> None:
    view = load(place.definitions).view("driver")
    heard: list[tuple[str, int, int]] = []

    async def load_it(reached: Reached) -> loading.Loaded:
        tell = lambda *what: heard.append(what)  # noqa: E731
        offline = OfflineStore(place.offline)
        (done,) = await loading.load(offline, reached.store, [view], NOW, tell, at_once=at_once)
        return done

    done = with_store(place, load_it)
    assert (done.rows, done.verified, heard[-1]) == (3, 3, ("driver", 3, 3))
    assert len([key for key in with_store(place, keys) if "{" in key]) == 3


def test_entities_whose_ids_are_none_are_left_out_and_counted(place: Place) -> None:
    table = pa.table(
        {"driver": ["", "x" * 257], "car": ["c", "c"], "at_us": [NOW - S] * 2, "seq": [8, 9], "fare": [1.0, 2]}
    )
    pa.parquet.write_table(table, Path(place.offline) / "trips" / "b.parquet")
    done = told(place, "materialize", "--view", "driver")["driver"]
    assert (done["rows"], done["skipped"]) == (3, 2)


def test_a_sample_of_a_large_view_is_bounded_and_fair(place: Place) -> None:
    n = 5_000
    table = pa.table(
        {
            "driver": [f"d{i}" for i in range(n)],
            "car": ["c"] * n,
            "at_us": np.full(n, NOW - 200 * S),
            "seq": np.arange(100, 100 + n),
            "fare": np.arange(n, dtype=np.float64),
        }
    )
    pa.parquet.write_table(table, Path(place.offline) / "trips" / "b.parquet")
    told(place, "materialize", "--view", "driver")
    found = told(place, "stats", "--rows", "1000")["driver"]
    assert (found["rows"], found["sampled"]) == (n + 3, 1_000)
    last = next(column for column in found["columns"] if column["column"] == "fare_last")
    # five standard errors of the median of 1000 draws
    assert abs(last["p50"] - n / 2) < 5 * n / 2 / 1_000**0.5


def test_a_store_that_does_not_answer_is_one_clear_line(place: Place, folder: Path) -> None:
    status, out, error = run(place, "stats", "--store", f"unix://{folder}/gone.sock")
    assert (status, out) == (1, "")
    assert error.startswith("tenfold: ")
    assert error.count("\n") == 1


def test_moments_of_commands_are_iso_too(place: Place) -> None:
    at = "2001-01-01T00:00:00+00:00"
    status, out, _ = run(place, "plan", "--at", at, "--json")
    assert (status, json.loads(out)["at_us"]) == (0, moment_us(at))
    assert json.loads(out)["views"][0]["entities"] == 0


def test_a_stream_without_files_is_planned_and_built_empty(place: Place) -> None:
    Path(place.definitions).write_text(DEFINITIONS.replace("trips/*.parquet", "later/*.parquet"))
    assert told(place, "plan", "--view", "car")["car"]["entities"] is None
    assert told(place, "materialize", "--view", "car")["car"]["rows"] == 0
    assert cells(told(place, "show", "c1", "--view", "car")["car"]) == {"fare_sum_1h": (-1.0, "MISSING")}
    assert run(place, "materialize", "--view", "driver")[0] == 1
