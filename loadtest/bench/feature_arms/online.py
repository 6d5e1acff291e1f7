"""Reads: what a request costs and how long it takes, at every server in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.bench.feature_arms.compare import facts, no_more
from loadtest.bench.feature_arms.lines import Worker
from loadtest.bench.feature_arms.servers import cpu_s
from loadtest.bench.feature_arms.sizes import CALLERS, COLUMNS, ENTITIES_ASKED, Sizes
from loadtest.bench.feature_arms.truth import wrong_rows
from loadtest.bench.report import Row, at_most

FEAST, FLOOR, OURS = "Feast gRPC", "floor gRPC", "ours native"
OURS_GRPCIO = "ours grpcio"
KINDS = {FEAST: "feast", FLOOR: "floor", OURS: "ours", OURS_GRPCIO: "ours"}
"""Arm -> which stub its callers use."""

_PROBES = 200
_WARM_CALLS = 20
_CPU_GOALS = {1: (1 / 10, 1.5), 100: (1 / 40, 1.5)}
_P99_GOALS = {1: (1 / 4, 2.0), 100: (1 / 20, 2.0)}
"""Entities asked -> at most this much of Feast's, at most this much of the floor's."""


@dataclass(frozen=True, slots=True)
class Server:
    """client: the worker whose callers are named as the arm is."""

    arm: str
    address: str
    pid: int
    client: Worker


def connect(servers: Sequence[Server]) -> None:
    for server in servers:
        server.client.ask("connect", name=server.arm, kind=KINDS[server.arm], address=server.address, callers=CALLERS)


def rows(servers: Sequence[Server], folder: Path, sizes: Sizes) -> list[Row]:
    connect(servers)
    made = [
        at_most(f"rows with wrong values, {arm}", wrong, 0, f"rows of {_PROBES}")
        for arm, wrong in wrong_values(servers, folder).items()
    ]
    taken = latencies(servers, sizes)
    under_load = loads(servers, sizes)
    for asked in ENTITIES_ASKED:
        entities = "1 entity" if asked == 1 else f"{asked} entities"
        cpu, rate, p99 = under_load[asked]
        made += facts(f"CPU per request, {entities}", cpu, "ms")
        made += _goals(f"CPU per request, {entities}", cpu, *_CPU_GOALS[asked])
        for share, name in ((0.5, "P50"), (0.99, "P99")):
            found = {arm: [float(np.quantile(every, share)) * 1000] for arm, every in taken[asked].items()}
            made += facts(f"{name}, {entities}", found, "ms")
        made += _goals(f"P99, {entities}", found, *_P99_GOALS[asked])
        made += facts(f"requests/s, {entities}, {CALLERS} callers", rate, "requests/s")
        made += facts(f"P99, {entities}, {CALLERS} callers", p99, "ms")
    return made


def _goals(measure: str, found: Mapping[str, Sequence[float]], of_feast: float, of_floor: float) -> list[Row]:
    return [no_more(measure, found, OURS, FEAST, of_feast), no_more(measure, found, OURS, FLOOR, of_floor)]


def wrong_values(servers: Sequence[Server], folder: Path) -> dict[str, int]:
    """Of entities here and there, how many have other values than they should."""
    truth = np.load(folder / "truth_online.npy")
    chosen = np.random.default_rng(1).choice(len(truth), _PROBES, replace=False)
    ids = [str(i) for i in chosen.tolist()]
    wrong = {}
    for server in servers:
        answer = bytes.fromhex(server.client.ask("values", name=server.arm, ids=ids))
        wrong[server.arm] = wrong_rows(np.frombuffer(answer, "<f4").reshape(-1, len(COLUMNS)), truth[chosen])
    return wrong


def latencies(servers: Sequence[Server], sizes: Sizes) -> dict[int, dict[str, list[float]]]:
    """Entities asked -> arm -> seconds of every call, one call at a time, the servers in turn."""
    taken: dict[int, dict[str, list[float]]] = {asked: defaultdict(list) for asked in ENTITIES_ASKED}
    for turn in range(-1, sizes.latency_rounds):
        for asked in ENTITIES_ASKED:
            for server in servers:
                calls = sizes.calls(asked) if turn >= 0 else _WARM_CALLS
                found = server.client.ask(
                    "latencies", name=server.arm, asked=asked, calls=calls, entities=sizes.entities, seed=turn + 1
                )
                if turn >= 0:
                    taken[asked][server.arm] += found
    return taken


Loads = tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]
"""Arm -> by round: the server's CPU in ms per request, requests/s, P99 in ms."""


def loads(servers: Sequence[Server], sizes: Sizes) -> dict[int, Loads]:
    """By entities asked, with CALLERS at once, the servers in turn."""
    measured: dict[int, Loads] = {
        asked: (defaultdict(list), defaultdict(list), defaultdict(list)) for asked in ENTITIES_ASKED
    }
    for turn in range(sizes.rounds):
        for asked in ENTITIES_ASKED:
            cpu, rate, p99 = measured[asked]
            for server in servers:
                before = cpu_s(server.pid)
                found = server.client.ask(
                    "load",
                    name=server.arm,
                    asked=asked,
                    seconds=sizes.load_s,
                    entities=sizes.entities,
                    seed=1000 * (turn + 1),
                )
                cpu[server.arm].append((cpu_s(server.pid) - before) * 1000 / found["calls"])
                rate[server.arm].append(found["calls"] / found["s"])
                p99[server.arm].append(found["p99_s"] * 1000)
    return measured
