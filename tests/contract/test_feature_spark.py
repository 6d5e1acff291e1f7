"""The same features on a real Spark: one session, two threads, everything small enough to start in seconds."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.define.expression import Expression, Kind
from services.feature.define.rows import Computed
from services.feature.offline.spark import SparkEngine, SparkError
from services.feature.offline.sql_script import ScriptError
from services.feature.offline.store import Clock, OfflineStore, Spine
from tests.unit.feature import golden
from tests.unit.feature.expression_examples import COLUMNS, EXAMPLES, ROWS, columns_of, listed, same

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

S = 1_000_000

# Spark's gateway is left to the garbage collector, sockets and all
pytestmark = [pytest.mark.filterwarnings("ignore:.*unclosed.*"), pytest.mark.timeout(300)]

_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "1g",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.sql.shuffle.partitions": "1",
    "spark.sql.autoBroadcastJoinThreshold": "-1",
    "spark.default.parallelism": "1",
    # to compile and re-plan queries takes longer than to run them over so few rows
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}


def _has_java() -> bool:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    sql = pytest.importorskip("pyspark.sql", reason="the extra `spark` is not installed")
    if not _has_java():
        pytest.skip("Spark needs Java, and there is none: install a Java 17 runtime, or set JAVA_HOME")
    folder = tmp_path_factory.mktemp("spark")
    builder = sql.SparkSession.builder.master("local[2]").appName("tenfold")
    for name, value in {**_SETTINGS, "spark.sql.warehouse.dir": str(folder / "warehouse")}.items():
        builder = builder.config(name, value)
    interrupt = signal.getsignal(signal.SIGINT)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    stop(session)
    signal.signal(signal.SIGINT, interrupt)  # Spark put its own there, which outlives its session


def stop(session: SparkSession) -> None:
    """Ends its Java process too, which would live as long as this one, and closes what it left open."""
    context = session.sparkContext
    gateway = context._gateway
    session.stop()
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(60)
    type(context)._gateway = type(context)._jvm = None
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden events, and the spine beside them."""
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    write_spine(folder / "spine.parquet", golden.spine())
    return folder


def write_spine(path: Path, spine: Spine) -> None:
    table = pa.table({
        "row_id": pa.array(range(len(spine)), pa.int64()),
        "entity_id": pa.array(spine.entity_ids, pa.string()),
        "as_of_us": pa.array(spine.as_of_us, pa.int64()),
    })  # fmt: skip
    pa.parquet.write_table(table, path)


def computed(view: View, rows: DataFrame, path: Path) -> Computed:
    """In the order of row_id; through a file, as rows are used."""
    assert rows.columns == ["row_id", *view.columns, "known"]
    rows.write.parquet(str(path))
    table = pa.parquet.read_table(path).sort_by("row_id")
    assert table["row_id"].to_pylist() == list(range(table.num_rows))
    columns = [table[column] for column in view.columns]
    return Computed(
        np.array([column.fill_null(0.0).to_numpy() for column in columns]).T,
        np.array([column.is_null().to_numpy() for column in columns]).T,
        np.array(table["known"].to_pylist(), dtype=np.bool_),
    )


def test_spark_says_what_the_contract_and_duckdb_say(session: SparkSession, folder: Path, tmp_path: Path) -> None:
    events = {
        "rides": str(folder / "rides/*.parquet"),
        "shifts": session.read.parquet(str(folder / "shifts")),
        "alarms": folder / "alarms/*.parquet",
    }
    engine, spine = SparkEngine(session), session.read.parquet(str(folder / "spine.parquet"))
    rows = computed(golden.VIEW, engine.compute(golden.VIEW, spine, events), tmp_path / "rows")
    assert golden.differences(rows) == []
    assert golden.differences(rows, OfflineStore(folder).compute(golden.VIEW, golden.spine())) == []


def test_row_expressions_say_on_spark_what_they_say_in_numpy(session: SparkSession, tmp_path: Path) -> None:
    types = {Kind.NUMBER: pa.float64(), Kind.TEXT: pa.string()}
    count = len(ROWS["a"])
    table = {name: pa.array(values, types[COLUMNS[name]]) for name, values in ROWS.items()}
    pa.parquet.write_table(pa.table({"row_id": list(range(count)), **table}), tmp_path / "given.parquet")
    expressions = [Expression.parse(text, COLUMNS, kind) for text, kind in EXAMPLES]
    listing = [f"{e.sql(lambda name: f'`{name}`', 'spark')} AS x{at}" for at, e in enumerate(expressions)]
    frame = session.read.parquet(str(tmp_path / "given.parquet")).selectExpr("row_id", *listing)
    frame.write.parquet(str(tmp_path / "found"))
    found = pa.parquet.read_table(tmp_path / "found").sort_by("row_id")
    for at, ((text, kind), expression) in enumerate(zip(EXAMPLES, expressions, strict=True)):
        wanted = listed(expression.evaluate(columns_of(ROWS)), kind)
        got = found[f"x{at}"].to_pylist()
        wrong = [row for row in range(count) if not same(got[row], wanted[row])]
        example = {name: values[wrong[0]] for name, values in ROWS.items()} if wrong else {}
        assert not wrong, (text, example, got[wrong[0]], wanted[wrong[0]])


TRIPS = Source(
    "trips", "trips/*.parquet", "ended_us", "known_us", "seq", entities=("driver",), values=("fare",), labels=("day",)
)
FARES = View("fares", "driver", (*windowed(TRIPS, "fare", (Aggregate.SUM,), ("",)), *latest(TRIPS, "fare")))


def write_trips(path: Path, **columns: Any) -> None:
    """columns: in place of the usual ones, None for none."""
    given = {"driver": ["ann", "bob", "ann"], "ended_us": [S, S, 50 * S], "known_us": [9 * S, 9 * S, 90 * S]}
    listed = {**given, "seq": [1, 2, 3], "fare": [1.0, 2.0, 4.0], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({name: column for name, column in listed.items() if column is not None}), path)


@pytest.fixture
def spine(session: SparkSession, tmp_path: Path) -> DataFrame:
    write_spine(tmp_path / "spine.parquet", Spine(["ann", "bob", None], np.array([60 * S] * 3)))
    return session.read.parquet(str(tmp_path / "spine.parquet"))


def test_the_clock_decides_what_a_moment_may_see(session: SparkSession, spine: DataFrame, tmp_path: Path) -> None:
    write_trips(tmp_path / "trips" / "a.parquet")
    given = Spine(["ann", "bob", None], np.array([60 * S] * 3))
    engine = SparkEngine(session)
    for clock, total in ((Clock.KNOWN, 1.0), (Clock.EVENT, 5.0)):
        rows = engine.compute(FARES, spine, {"trips": f"{tmp_path}/trips/*.parquet"}, clock)
        found = computed(FARES, rows, tmp_path / clock)
        assert found.values[0, 0] == total
        wanted = OfflineStore(tmp_path).compute(FARES, given, clock)
        assert (found.null == wanted.null).all()
        assert (found.values[~found.null] == wanted.values[~found.null]).all()


def views(session: SparkSession) -> set[str]:
    return {row.viewName for row in session.sql("SHOW VIEWS").collect()}


def test_nothing_of_the_engine_stays_in_the_session(session: SparkSession, spine: DataFrame, tmp_path: Path) -> None:
    write_trips(tmp_path / "trips.parquet")
    session.range(3).createOrReplaceTempView("asked")  # also the name of a step
    before = views(session)
    rows = SparkEngine(session).compute(FARES, spine, {"trips": str(tmp_path / "trips.parquet")})
    with pytest.raises(SparkError):
        SparkEngine(session).compute(FARES, spine, {"trips": session.range(3)})
    assert views(session) == before
    assert "asked" in before
    assert computed(FARES, rows, tmp_path / "rows").values[:2, 0].tolist() == [1.0, 2.0]
    session.catalog.dropTempView("asked")


def test_statements_run_one_by_one_give_the_same(session: SparkSession, spine: DataFrame, tmp_path: Path) -> None:
    write_trips(tmp_path / "trips" / "a.parquet")
    trips = session.read.parquet(str(tmp_path / "trips"))
    spine.createOrReplaceGlobalTempView("labels")
    trips.createOrReplaceGlobalTempView("trips")
    engine = SparkEngine(session)
    *steps, query = engine.statements(FARES, {"trips": "global_temp.trips"}, "global_temp.labels")
    for step in steps:
        session.sql(step)
    found = computed(FARES, session.sql(query), tmp_path / "rows")
    wanted = OfflineStore(tmp_path).compute(FARES, Spine(["ann", "bob", None], np.array([60 * S] * 3)))
    assert (found.values == wanted.values).all()
    assert (found.null == wanted.null).all()
    assert (found.known == wanted.known).all()
    for step in steps:
        session.catalog.dropTempView(step.split()[5])
    session.catalog.dropGlobalTempView("labels")
    session.catalog.dropGlobalTempView("trips")


def test_folders_that_are_named_after_a_column_are_that_column(
    session: SparkSession, spine: DataFrame, tmp_path: Path
) -> None:
    write_trips(tmp_path / "lake" / "driver=ann" / "a.parquet", driver=None, fare=[1.0, 2.0, 4.0])
    write_trips(tmp_path / "lake" / "driver=bob" / "a.parquet", driver=None, fare=None)
    rows = SparkEngine(session).compute(FARES, spine, {"trips": tmp_path / "lake" / "*" / "*.parquet"})
    found = computed(FARES, rows, tmp_path / "rows")
    assert found.values[:2, 0].tolist() == [3.0, 0.0]
    assert found.known.tolist() == [True, True, False]


def test_what_cannot_be_read_is_refused_by_name(session: SparkSession, spine: DataFrame, tmp_path: Path) -> None:
    engine = SparkEngine(session)

    def refusal(**columns: Any) -> str:
        write_trips(tmp_path / "trips.parquet", **columns)
        with pytest.raises(SparkError, match=r"^view 'fares', source 'trips': ") as refused:
            engine.compute(FARES, spine, {"trips": str(tmp_path / "trips.parquet")})
        return str(refused.value)

    assert "no column 'fare', there are: driver, ended_us" in refusal(fare=None)
    assert "column 'fare' must be a number, got string" in refusal(fare=["1", "2", "3"])
    assert "column 'known_us' must be an integer, got double" in refusal(known_us=[1.0, 2.0, 3.0])
    assert "column 'driver' must be text, got bigint" in refusal(driver=[1, 2, 3])
    with pytest.raises(SparkError, match="source 'trips': events must hold it, got \\['calls'\\]"):
        engine.compute(FARES, spine, {"calls": spine})
    with pytest.raises(SparkError, match=r"source 'trips': its events cannot be read: .*PATH_NOT_FOUND"):
        engine.compute(FARES, spine, {"trips": f"{tmp_path}/nowhere/*.parquet"})
    write_trips(tmp_path / "trips.parquet")
    with pytest.raises(SparkError, match="source 'spine': there is no column 'as_of_us'"):
        engine.compute(FARES, spine.drop("as_of_us"), {"trips": str(tmp_path / "trips.parquet")})
    with pytest.raises(ScriptError, match=r"source 'trips': a table must be dataset.table, .* got 'trips; DROP'"):
        engine.statements(FARES, {"trips": "trips; DROP"})
