"""Features moved to the online store, and joined to labels: rows/s of every arm in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loadtest.bench.feature_arms.compare import best, facts, no_less, no_more, ratio
from loadtest.bench.feature_arms.lines import Worker
from loadtest.bench.feature_arms.servers import Store
from loadtest.bench.feature_arms.sizes import VIEWS, VOLUMES, Sizes
from loadtest.bench.report import Row, at_least, at_most, fact

OURS, FEAST, PACKED = "ours", "Feast", "DuckDB -> packed MSET"
FEAST_DUCKDB, FEAST_DASK = "Feast DuckDB store", "Feast dask store"
FEAST_ENGINES = {FEAST_DUCKDB: "duckdb", FEAST_DASK: "dask"}
LIMITS = {"DuckDB ASOF": "asof", "DuckDB index then gather": "gather", "Polars join_asof": "polars"}
IDENTICAL_RUNS = 20
_LABELS = 8

Measured = dict[str, list[float]]
Join = Callable[[str], Any]
"""Volume -> seconds, rows and how many of them are wrong."""


def store_name(engine: str, volume: str) -> str:
    """Of one of Feast's repositories."""
    return f"{engine}_{volume}"


def materializing(workers: Mapping[str, Worker], stores: Mapping[str, Store], folder: Path, sizes: Sizes) -> list[Row]:
    """Leaves every store filled, for reads. workers, stores: by arm."""
    rate: Measured = defaultdict(list)
    for turn in range(-1, sizes.rounds):
        for arm, worker in workers.items():
            if arm == FEAST and not 0 <= turn < sizes.slow_rounds:
                continue
            stores[arm].clear()
            if arm == FEAST:
                engine = ("duckdb", "dask")[turn % 2]
                found = worker.ask("materialize", name=store_name(engine, "1x"))
            else:
                found = worker.ask("materialize", folder=str(folder), port=stores[arm].port)
            if turn >= 0:  # the turn before is to warm up
                rate[arm].append(sizes.entities * len(VIEWS) / found["s"])
    if rate[FEAST]:
        rate[FEAST] = [max(rate[FEAST])] * sizes.rounds  # its stores take turns, and the better one counts
    used = {arm: stores[arm].used() for arm in workers}
    data: Measured = {arm: [memory.data_bytes / sizes.entities] for arm, memory in used.items()}
    # the table doubles now and then, and takes as much for a key of any size: the goal against Feast is of the data
    total: Measured = {arm: [memory.total_bytes / sizes.entities] for arm, memory in used.items()}
    return [
        *facts("materialise", rate, "rows/s"),
        no_less("materialise", rate, OURS, FEAST, 15),
        no_less("materialise", rate, OURS, PACKED, 0.6),
        *facts("memory per entity", data, "bytes"),
        no_more("memory per entity", data, OURS, FEAST, 0.46),
        no_more("memory per entity", data, OURS, PACKED, 1.1),
        *facts("memory per entity with the table of keys", total, "bytes"),
        no_more("memory per entity with the table of keys", total, OURS, PACKED, 1.1),
    ]


def joining(ours: Worker, limits: Worker, feast: Worker | None, folder: Path, sizes: Sizes) -> list[Row]:
    """Labels/s of the point-in-time join, at both volumes."""
    arms: dict[str, Join] = {OURS: lambda volume: ours.ask("join", folder=str(folder), volume=volume)}
    for arm, engine in LIMITS.items():
        arms[arm] = partial(_limit, limits, engine, str(folder))
    if feast:
        arms |= {arm: partial(_feast, feast, engine, str(folder)) for arm, engine in FEAST_ENGINES.items()}
    for join in arms.values():
        join(VOLUMES[0])  # to warm up
    made: list[Row] = []
    by_volume: dict[str, Measured] = {}
    for volume in VOLUMES:
        rate, lost = _joined(arms, volume, sizes)
        made += facts(f"point-in-time join, {volume}", rate, "labels/s")
        made += [_loss(arm, volume, rows) for arm, rows in lost.items()]
        by_volume[volume] = rate
    rate = by_volume["10x"]
    return [
        *made,
        no_less("point-in-time join, 10x", rate, OURS, FEAST_DUCKDB, 2),
        no_less("point-in-time join, 10x", rate, OURS, FEAST_DASK, 12),
        no_less("point-in-time join, 10x", rate, OURS, best(rate, list(LIMITS)), 0.7),
        at_least("speed per label at 10x over 1x", ratio(rate[OURS], by_volume["1x"][OURS]), 0.8, "x", OURS),
    ]


def _limit(worker: Worker, engine: str, folder: str, volume: str) -> Any:
    return worker.ask("join", engine=engine, folder=folder, volume=volume)


def _feast(worker: Worker, engine: str, folder: str, volume: str) -> Any:
    return worker.ask("join", name=store_name(engine, volume), folder=folder, volume=volume)


def _joined(arms: Mapping[str, Join], volume: str, sizes: Sizes) -> tuple[Measured, dict[str, int]]:
    """Labels/s by round, and labels that were lost or have wrong values, at worst."""
    labels = sizes.labels(volume)
    rate: Measured = defaultdict(list)
    lost = dict.fromkeys(arms, 0)
    for turn in range(sizes.rounds):
        for arm, join in arms.items():
            if arm in FEAST_ENGINES and turn >= sizes.slow_rounds:
                continue
            found = join(volume)
            rate[arm].append(labels / found["s"])
            lost[arm] = max(lost[arm], labels - found["rows"] + found["wrong"])
    return rate, lost


def _loss(arm: str, volume: str, lost: int) -> Row:
    measure = f"labels lost or with wrong values, {volume}, {arm}"
    return fact(measure, lost, "labels") if arm in FEAST_ENGINES else at_most(measure, lost, 0, "labels")


def correctness(ours: Worker, feast: Worker | None, data: Path, scratch: Path) -> list[Row]:
    """Eight labels with known features, and whether runs differ."""
    right = ours.ask("right_rows", folder=str(scratch / "contract"))
    made = [at_least(f"contract, {OURS}", right, _LABELS, f"labels right of {_LABELS}")]
    for arm, engine in FEAST_ENGINES.items() if feast else ():
        assert feast is not None
        theirs = feast.ask("right_rows", repository=str(scratch / f"contract_{engine}"), engine=engine)
        made.append(fact(f"contract, {arm}", theirs, f"labels right of {_LABELS}"))
    digests = [ours.ask("digest", folder=str(data), volume="1x") for _ in range(IDENTICAL_RUNS)]
    identical = max(digests.count(digest) for digest in digests)
    return [*made, at_least(f"runs with the same bytes, {OURS}", identical, IDENTICAL_RUNS, f"runs of {len(digests)}")]
