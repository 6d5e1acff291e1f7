import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from services.feature.check.checks import Checked
from services.feature.check.skew import ColumnSkew
from services.feature.commands import moments, openmetrics, planning, plots, screen
from services.feature.commands.app import commands
from services.feature.commands.place import Place
from services.feature.commands.planning import Change, Expected
from services.feature.commands.stored import UnreadableStates, opened
from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.online.catalogue import PublishedView

S, DAY = 1_000_000, 86_400_000_000
FIRST = moments.moment_us("2013-03-01")
DEFINITIONS = """
from services.feature.define.definition import Aggregate, RequestView, Source, Value, View, latest, windowed

TRIPS = Source("trips", "trips/*.parquet", "at_us", "known_us", "seq", entities=("driver",), values=("fare",))
VIEWS = (
    View("driver", "driver", (*windowed(TRIPS, "fare", (Aggregate.COUNT, Aggregate.MEAN), ("1h",)),
                              *latest(TRIPS, "fare")), ttl_s=3600.0),
)
REQUEST_VIEWS = (RequestView("asked", ("offer",), (Value("better", "input.offer - driver.fare_last"),)),)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Two drivers: ann is known a minute after she drove, bob five."""
    (tmp_path / "events" / "trips").mkdir(parents=True)
    n = 48
    at_us = FIRST + np.arange(n, dtype=np.int64) * 3600 * S
    table = pa.table(
        {
            "driver": ["ann" if i % 2 == 0 else "bob" for i in range(n)],
            "at_us": at_us,
            "known_us": at_us + np.where(np.arange(n) % 2 == 0, 60, 300) * S,
            "seq": np.arange(n, dtype=np.int64),
            "fare": np.arange(n, dtype=np.float64),
        }
    )
    pa.parquet.write_table(table, tmp_path / "events" / "trips" / "a.parquet")
    (tmp_path / "views.py").write_text(DEFINITIONS)
    return Place(
        "taxis", str(tmp_path / "views.py"), str(tmp_path / "events"), "", "no stack 'default' is running here"
    )


def run(place: Place, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error."""
    done = CliRunner().invoke(commands(lambda _mesh, _stack: place), [str(one) for one in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def json_of(place: Place, *arguments: str) -> tuple[int, Any]:
    status, out, _ = run(place, *arguments, "--json")
    assert out.count("\n") == 1
    return status, json.loads(out)


def test_help_of_the_commands_waits_for_nothing_heavy() -> None:
    heavy = "{'grpc', 'numpy', 'duckdb', 'pyarrow', 'rich', 'msgspec', 'plotext', 'hiredis'}"
    code = (
        f"import sys, services.feature.commands.app as c; c.commands(None); print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_service_needs_none_of_what_the_commands_speak_with() -> None:
    code = "import sys, services.feature.__main__; print(sorted({'typer', 'rich', 'plotext'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_valid_definitions_are_told_with_their_windows_and_steps(place: Place) -> None:
    status, out, _ = run(place, "validate")
    assert status == 0
    assert "1h/5m" in out
    assert "asked" in out
    status, told = json_of(place, "validate")
    assert (status, told["valid"], told["sources"][0]["rows"]) == (0, True, 48)
    assert told["views"][0]["windows"] == [{"window": "", "step_us": 0}, {"window": "1h", "step_us": 300 * S}]


def test_a_wrong_definition_is_one_line_naming_file_line_view_and_column(place: Place) -> None:
    file = Path(place.definitions)
    file.write_text(DEFINITIONS.replace('latest(TRIPS, "fare")', 'latest(TRIPS, "tip")'))
    status, out, told = run(place, "validate")
    assert (status, out, told.count("\n")) == (2, "", 1)
    assert f"{file}:" in told
    assert "view 'driver', column 'tip_last'" in told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("Aggregate.MEAN", "Aggregate.MEEN", "there is no MEEN; of Aggregate there are: COUNT, SUM, MEAN"),
        ("Aggregate.MEAN", '"mean"', "column 'fare': an aggregate must be of Aggregate, got 'mean'"),
        ('("1h",)', "(1,)", "a window must be 1 to 9999 followed by s, m, h or d, got 1"),
        (
            'entities=("driver",)',
            'entities=("driver")',
            "source 'trips': entities must be a tuple of names, got 'driver'",
        ),
        ("ttl_s=3600.0),", "ttl_s=3600.0", ": '(' was never closed"),
        ("ttl_s=3600.0", "ttl_s=HOUR", "NameError: name 'HOUR' is not defined"),
        ("VIEWS = (", "VIEW = (", "a module of definitions must have VIEWS"),
        ("REQUEST_VIEWS = (", "REQUEST_VIEWS = (TRIPS, ", "REQUEST_VIEWS must hold RequestView, got Source"),
        (
            'driver.fare_last"',
            'driver.fare_lost"',
            "request view 'asked', column 'better': no column 'driver.fare_lost'",
        ),
    ],
)
def test_every_slip_in_definitions_is_one_line_that_names_the_file(
    place: Place, before: str, after: str, told: str
) -> None:
    file = Path(place.definitions)
    assert before in DEFINITIONS
    file.write_text(DEFINITIONS.replace(before, after, 1))
    status, out, error = run(place, "validate")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"tenfold: {file}:")
    assert told in error


@pytest.mark.parametrize(
    ("columns", "named", "problem"),
    [
        ({"fare": ["1", "2"]}, "fare", "must be a number, got string"),
        ({"known_us": pa.array([1, 2], pa.timestamp("us"))}, "known_us", "must be an integer, got timestamp"),
        ({"seq": None}, "seq", "there is no such column; there are: driver"),
        ({"driver": [1, 2]}, "driver", "must be text, got int64"),
    ],
)
def test_a_file_that_does_not_fit_its_source_is_named_with_the_column(
    place: Place, columns: dict[str, Any], named: str, problem: str
) -> None:
    right: dict[str, Any] = {"driver": ["a", "b"], "at_us": [1, 2], "known_us": [1, 2], "seq": [1, 2], "fare": [1.0, 2]}
    table = pa.table({name: column for name, column in (right | columns).items() if column is not None})
    file = Path(place.offline) / "trips" / "b.parquet"
    pa.parquet.write_table(table, file)
    status, told = json_of(place, "validate")
    assert (status, told["valid"], len(told["problems"])) == (1, False, 1)
    found = told["problems"][0]
    assert (found["source"], found["file"], found["column"]) == ("trips", str(file), named)
    assert found["problem"].startswith(problem)


def test_a_source_without_files_and_one_that_is_no_parquet_are_told(place: Place) -> None:
    for file in (Path(place.offline) / "trips").iterdir():
        file.unlink()
    assert json_of(place, "validate")[1]["problems"][0]["problem"] == "no such file"
    (Path(place.offline) / "trips" / "a.parquet").write_text("not that")
    assert json_of(place, "validate")[1]["problems"][0]["problem"].startswith("cannot be read as Parquet")


def test_a_column_that_only_some_files_lack_is_null_there_and_no_mistake(place: Place) -> None:
    table = pa.table({"driver": ["a"], "at_us": [1], "known_us": [1], "seq": [99]})
    pa.parquet.write_table(table, Path(place.offline) / "trips" / "b.parquet")
    assert json_of(place, "validate")[0] == 0


@pytest.mark.parametrize("command", ["plan", "materialize", "show ann", "stats"])
def test_without_an_online_store_the_command_says_where_to_get_one(place: Place, command: str) -> None:
    status, out, told = run(place, *command.split())
    assert (status, out) == (1, "")
    assert told == "tenfold: no stack 'default' is running here; name one with --store\n"


def test_a_store_that_is_none_is_told_without_its_password(place: Place) -> None:
    status, _, told = run(place, "stats", "--store", "mysql://me:secret@here")
    assert status == 1
    assert told.startswith("tenfold: ")
    assert "secret" not in told


@pytest.mark.parametrize(
    "arguments",
    [
        "plan --at yesterday --store unix:///nowhere",
        "plan --at -5 --store unix:///nowhere",
        "backfill driver --from 2013-03-02 --to 2013-03-01 --out x",
        "backfill driver --from 2013-3 --to 2013-03-01 --out x",
        "backfill pilot --from 2013-03-01 --to 2013-03-01 --out x",
        "training-set --labels x --time t --out y --clock wall",
        "training-set --labels x --time t --out y --entity driver",
        "check",
        "check --training-set x --view driver",
        "stats --plot --json",
    ],
)
def test_a_question_that_makes_no_sense_is_one_line_and_status_2(place: Place, arguments: str) -> None:
    status, out, told = run(place, *arguments.split())
    assert (status, out, told.count("\n")) == (2, "", 1)
    assert told.startswith("tenfold: ")


def test_a_mesh_without_definitions_says_so(place: Place) -> None:
    status, _, told = run(Place("taxis", "", place.offline, ""), "validate")
    assert status == 2
    assert "mesh 'taxis' names no definitions" in told


def test_a_dry_backfill_writes_nothing_and_a_real_one_every_day_once(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "days"
    asked = ("backfill", "driver", "--from", "2013-03-01", "--to", "2013-03-02", "--out", str(out), "--buckets", "2")
    assert json_of(place, *asked, "--dry-run")[1]["parts"] == 4
    assert not out.exists()
    status, told = json_of(place, *asked)
    assert (status, told["parts"], told["rows"]) == (0, 4, 4)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")}
    assert json_of(place, *asked)[1]["rows"] == 4
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.parquet")} == before
    status, _, told = run(place, *(one if one != "2013-03-02" else "2013-03-03" for one in asked))
    assert status == 1
    assert "days differ" in told


@pytest.fixture
def labels(tmp_path: Path) -> str:
    """Two hours after midnight and then every hour, a minute and a half past: bob's trip of that hour is not known."""
    table = pa.table(
        {
            "who": ["bob"] * 20,
            "when": pa.array(
                [FIRST + (2 * i + 1) * 3600 * S + 90 * S for i in range(1, 21)], pa.timestamp("us", "UTC")
            ),
            "offer": [10.0] * 20,
            "paid": list(range(20)),
        }
    )
    pa.parquet.write_table(table, tmp_path / "labels.parquet")
    return str(tmp_path / "labels.parquet")


def test_a_training_set_has_every_label_with_what_was_known(place: Place, labels: str, tmp_path: Path) -> None:
    asked = ("training-set", "--labels", labels, "--time", "when", "--entity", "driver=who", "--out", tmp_path / "t")
    status, told = json_of(place, *asked, "--dry-run")
    assert (status, told["rows"], (tmp_path / "t").exists()) == (0, 20, False)
    assert told["columns"][-1] == "asked.better"
    status, told = json_of(place, *asked)
    assert (status, told["rows"], told["parts"]) == (0, 20, 1)
    table = pa.parquet.read_table(tmp_path / "t" / "part-00000.parquet")
    assert table["paid"].to_pylist() == list(range(20))
    assert table["driver.fare_last"].to_pylist()[:3] == [1.0, 3.0, 5.0]
    assert table["asked.better"].to_pylist()[:3] == [9.0, 7.0, 5.0]


def test_a_label_file_without_the_entity_is_named_before_anything_is_written(
    place: Place, labels: str, tmp_path: Path
) -> None:
    for dry in ((), ("--dry-run",)):
        status, _, told = run(
            place, "training-set", "--labels", labels, "--time", "when", "--out", tmp_path / "t", *dry
        )
        assert (status, (tmp_path / "t").exists()) == (1, False)
        assert "there is no column 'driver'" in told


def test_a_training_set_of_which_nothing_was_known_says_so(place: Place, labels: str, tmp_path: Path) -> None:
    asked = ("training-set", "--labels", labels, "--view", "driver", "--entity", "driver=who")
    _, out, told = run(place, *asked, "--time", "when", "--out", tmp_path / "t")
    assert "known by then: driver 100.0%" in out
    assert told == ""
    _, out, told = run(place, *asked, "--time", "paid", "--out", tmp_path / "u")
    assert "known by then: driver 0.0%" in out
    assert told == "tenfold: view 'driver': nothing was known of any driver: are ids and moments right?\n"


def test_an_interrupt_within_a_query_ends_the_command_as_any_other() -> None:
    code = """
import _thread, sys, threading, duckdb, typer
from services.feature.commands.app import _told
try:
    with _told(), duckdb.connect() as con:
        threading.Timer(0.2, _thread.interrupt_main).start()
        while True:
            con.execute("SELECT sum(a.range * b.range) FROM range(10000) a, range(10000) b")
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)
    assert done.stderr == "tenfold: interrupted; what is whole stays, and the same command goes on\n"


def test_the_help_says_what_the_exit_status_means(place: Place) -> None:
    assert "Exit status: 0" in run(place, "--help")[1]


def test_a_view_that_is_worked_out_on_request_cannot_be_backfilled(place: Place, tmp_path: Path) -> None:
    asked = ("backfill", "asked", "--from", "2013-03-01", "--to", "2013-03-01", "--out", tmp_path / "x")
    status, _, told = run(place, *asked)
    assert (status, "view 'asked' is worked out on request and not stored; stored are: driver" in told) == (2, True)


def test_a_leak_is_found_by_check_and_an_honest_set_passes(place: Place, labels: str, tmp_path: Path) -> None:
    asked = ("training-set", "--labels", labels, "--time", "when", "--entity", "driver=who", "--view", "driver")
    assert run(place, *asked, "--out", tmp_path / "honest")[0] == 0
    assert run(place, *asked, "--out", tmp_path / "leak", "--clock", "event")[0] == 0
    assert json_of(place, "check", "--training-set", tmp_path / "honest")[1]["agrees"] is True
    metrics = tmp_path / "skew.prom"
    status, out, _ = run(place, "check", "--training-set", tmp_path / "leak", "--metrics", metrics)
    assert status == 1
    assert "driver.fare_last" in out
    line = 'tenfold_feature_mismatch_ratio{path="training set",view="driver",feature="fare_last"} 1.0'
    assert line in metrics.read_text().splitlines()
    assert json_of(place, "check", "--training-set", tmp_path / "leak")[0] == 1


def test_a_day_is_replayed_by_every_path(place: Place) -> None:
    status, told = json_of(place, "check", "--day", "2013-03-02", "--view", "driver")
    assert (status, told["agrees"], set(told["checks"])) == (0, True, {"stream", "request"})
    assert set(json_of(place, "check", "--day", "2013-03-02", "--view", "asked")[1]["checks"]) == {
        "stream",
        "request",
        "on request",
    }
    assert run(place, "check", "--day", "2019-03-02")[0] == 1
    assert all(column["rows"] > 0 for column in told["checks"]["stream"]["columns"])


def test_an_empty_sample_of_served_rows_is_not_told_to_agree(place: Place, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    status, out, _ = run(place, "check", "--served", tmp_path / "served")
    assert status == 1
    assert "nothing was compared" in out


# the pieces


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("1362096000000000", FIRST),
        ("2013-03-01", FIRST),
        ("2013-03-01T00:00:00Z", FIRST),
        ("2013-03-01T01:00:00+01:00", FIRST),
        ("2013-03-01T00:00:00.000001", FIRST + 1),
    ],
)
def test_moments_are_iso_or_microseconds(text: str, us: int) -> None:
    assert moments.moment_us(text) == us


@pytest.mark.parametrize("text", ["", "now", "0", "-1", "2013-02-30", "9" * 17])
def test_what_is_no_moment_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="a moment must be"):
        moments.moment_us(text)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 m 1 s"), (7200, "2 h"), (90_000, "1 d 1 h"), (-120, "-2 m")],
)
def test_ages_are_told_as_people_do(seconds: float, told: str) -> None:
    assert moments.age(seconds) == told


TRIPS = Source("trips", "*.parquet", "at_us", "known_us", "seq", entities=("driver",), values=("fare",))
OTHER = Source("trips", "*.parquet", "at_us", "at_us", "seq", entities=("driver",), values=("fare",))


def view_of(source: Source = TRIPS, windows: tuple[str, ...] = ("1h",), name: str = "driver", **more: Any) -> View:
    features = (*windowed(source, "fare", (Aggregate.MEAN,), windows), *latest(source, "fare"))
    return View(name, "driver", features, **more)


def published(view: View, definition: str | None = None, kind: str = "row") -> PublishedView:
    hash_ = f"{view.schema().schema_hash:016x}"
    definition = view.fingerprint() if definition is None else definition
    return PublishedView(view.name, "driver", list(view.columns), view.ttl_s, hash_, FIRST, 7, 3, kind, (), definition)


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (None, Change.NEW),
        (published(view_of()), Change.UNCHANGED),
        (published(view_of(OTHER)), Change.CHANGED),  # the same columns from another clock
        (published(view_of(windows=("1h", "2h"))), Change.CHANGED),
        (published(view_of(), ""), Change.UNRECORDED),
    ],
)
def test_a_view_is_compared_by_its_meaning(before: PublishedView | None, change: Change) -> None:
    assert planning.change_of(view_of(), before) is change


def test_a_plan_counts_on_the_next_generations_and_tells_what_is_no_longer_defined() -> None:
    new, wider = view_of(name="new"), view_of(windows=("1h", "2h"))
    gone = published(view_of(name="gone"))
    expected = {"new": Expected.of(["ann", "bo"]), "driver": Expected.of(["ann"])}
    found = planning.planned(
        [new, wider],
        ["new", "driver"],
        [published(view_of()), gone],
        expected,
        {},
        9,
        lambda _view, number: f"tf:{number}:{{",
        FIRST + 5 * S,
    )
    assert [(one.view, one.change, one.generation, one.next_generation) for one in found] == [
        ("new", Change.NEW, 0, 9),
        ("driver", Change.CHANGED, 3, 10),
        ("gone", Change.UNDEFINED, 3, 0),
    ]
    assert (found[1].added, found[1].removed, found[1].age_s) == (["fare_mean_2h"], [], 5.0)
    assert found[0].bytes == 2 * planning.row_bytes(new) + len("tf:9:{ann}") + len("tf:9:{bo}")


def test_states_without_the_definition_that_made_them_are_not_guessed_at() -> None:
    before = published(view_of(stream=True), kind="state")
    for defined in (None, view_of(windows=("2h",), stream=True)):
        with pytest.raises(UnreadableStates, match="view 'driver' cannot be finished"):
            opened(before, defined, [b"x"], FIRST)


def test_numbers_that_json_lacks_are_texts() -> None:
    value = {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5], "c": Change.NEW}
    assert screen.plain(value) == {"a": "NaN", "b": ["Infinity", "-Infinity", 1.5], "c": "new"}


def test_metrics_are_open_metrics_text() -> None:
    nothing = (0.0, 0.0, 0.0)
    skew = ColumnSkew("v", "c", 4, 1, 0.5, 0.25, 0.0, nothing, nothing, 0.125, 2)
    lines = openmetrics.text_of([Checked("served", [skew])]).splitlines()
    assert lines[-1] == "# EOF"
    assert [line for line in lines if not line.startswith("#")] == [
        'tenfold_feature_mismatch_ratio{path="served",view="v",feature="c"} 0.25',
        'tenfold_feature_null_ratio{path="served",view="v",feature="c",of="given"} 0.25',
        'tenfold_feature_null_ratio{path="served",view="v",feature="c",of="expected"} 0.0',
        'tenfold_feature_shift{path="served",view="v",feature="c"} 0.125',
    ]


def test_progress_where_nobody_sees_a_bar_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with screen.Progress("rows", clock=lambda: now[0]) as progress:
        update = progress.of("loading")
        update(0, 1000)
        now[0] = 1.0
        update(100, 1000)
        assert capsys.readouterr().err == ""
        now[0] = 10.0
        update(500, 1000)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "loading: 500 of 1,000 rows, 50/s, 10 s left\n")


def test_pictures_name_what_they_show_and_survive_odd_values() -> None:
    told = plots.freshness({"origin": 90.0, "dest": 7200.0, "never": float("nan")}, colour=False)
    assert "origin" in told
    assert "hours" in told
    assert "never" not in told
    assert "\x1b" not in told
    assert "all.mean, 3 of 3 values" in plots.distribution("all.mean", np.array([1.0, 2.0, 9.0]), colour=False)
    assert plots.distribution("flat", np.full(5, 2.0), colour=False) == "flat: 100% of 5 are 2"
    assert plots.distribution("none", np.zeros(0), colour=False) == "none: no values"
    assert plots.freshness({}, colour=False) == ""


def test_a_source_that_only_streams_write_needs_no_file(place: Place) -> None:
    file = Path(place.definitions)
    file.write_text(DEFINITIONS.replace("trips/*.parquet", "later/*.parquet"))
    assert json_of(place, "validate")[0] == 1
    file.write_text(file.read_text().replace("ttl_s=3600.0", "stream=True"))
    assert json_of(place, "validate")[0] == 0
