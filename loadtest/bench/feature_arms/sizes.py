"""How large the benchmark is, and the names that every arm shares.

100,000 entities, 2 views of 25 float32 features. Events come at two volumes, "1x" and "10x", which differ in both
events and labels, so that labels/s at one may be held against labels/s at the other.
"""

from __future__ import annotations

from dataclasses import dataclass

VIEWS = ("fv0", "fv1")
PER_VIEW = 25
FEATURES = {view: tuple(f"{view}_f{number:02d}" for number in range(PER_VIEW)) for view in VIEWS}
COLUMNS = tuple(name for view in VIEWS for name in FEATURES[view])
VOLUMES = ("1x", "10x")
SNAPSHOTS = {"1x": 2, "10x": 20}
"""Events per entity and view."""

START_US = 1_767_225_600_000_000  # 2026-01-01 UTC
SPAN_S = 30 * 86_400
END_US = START_US + (SPAN_S + 86_400) * 1_000_000
"""Every event is known before it, so this is the moment that is materialised."""

ENTITIES_ASKED = (1, 100)
"""Entities of one request."""

CALLERS = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """labels: rows of the training set, by volume.

    rounds: how often every arm is measured; slow_rounds: how often the peer's slow parts are.
    load_s: seconds of one throughput measurement. latency_rounds: turns of the sequential calls; calls: how many each
    arm makes in one turn, by entities asked.
    stream_s: seconds of events at a steady rate; burst: events as fast as they are taken.
    day: when batch, stream and request are compared, at about day_rows moments per view. spark_rows: moments at which
    DuckDB and Spark are; 0 for not at all.
    """

    entities: int = 100_000
    labels_1x: int = 20_000
    rounds: int = 3
    slow_rounds: int = 2
    load_s: float = 4.0
    latency_rounds: int = 10
    calls_of_1: int = 150
    calls_of_100: int = 40
    stream_s: float = 15.0
    burst: int = 50_000
    day: str = "2013-02-14"  # so late that the longest windows, of 28 days, are full
    day_rows: int = 400
    spark_rows: int = 400

    def labels(self, volume: str) -> int:
        return self.labels_1x * SNAPSHOTS[volume] // SNAPSHOTS["1x"]

    def calls(self, entities: int) -> int:
        return self.calls_of_1 if entities == 1 else self.calls_of_100


FULL = Sizes()
QUICK = Sizes(
    entities=5_000,
    labels_1x=1_000,
    rounds=1,
    slow_rounds=1,
    load_s=1.0,
    latency_rounds=2,
    calls_of_1=100,
    calls_of_100=20,
    stream_s=4.0,
    burst=5_000,
    day="2013-01-05",
    day_rows=20,
    spark_rows=0,
)
