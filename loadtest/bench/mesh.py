"""What a Predict costs: CPU time of every process of the mesh, per request.

Starts the flights mesh as `tenfold up` does, sends requests from this process (which is not counted), and reads each
process's CPU time from the kernel before and after. Two loads: 200 requests a second in an open loop, where calls come
one by one and little can be shared; and saturation, 64 callers in a closed loop.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.flights import replay
from deploy.flights.ask import request_of
from deploy.flights.dataset import BASE_MOMENT_US
from loadtest.bench.processes import cpu_s, usage
from loadtest.bench.report import Row, at_most, emit, fact
from loadtest.driver import Record, Send, closed_loop, constant, open_loop, percentile
from services.mesh.channels import Channel, open_channel
from services.mesh.errors import CalleeError
from tenfold.router.v1.router_pb2 import PredictResponse

METHOD = "/tenfold.router.v1.RouterService/Predict"
RATE, CALLERS = 200, 64
TIMEOUT_S = 2.0
PRIORITIES = ("critical", "standard", "standard", "background", "standard")
LIGHT_GOAL_MS, SATURATED_GOAL_MS, IDLE_GOAL_MB = 1.2, 0.8, 1024


class Stack:
    """The flights mesh in processes of its own, under a name of its own."""

    def __init__(self, name: str, mesh: Path | None) -> None:
        self._name = name
        self._mesh = mesh

    def __enter__(self) -> Stack:
        chosen = ("--mesh", str(self._mesh)) if self._mesh else ()
        self._tenfold("up", "--detach", *chosen)
        return self

    def __exit__(self, *_: object) -> None:
        self._tenfold("down")

    def status(self) -> Mapping[str, object]:
        return dict(json.loads(self._tenfold("status", "--json")))

    def _tenfold(self, command: str, *arguments: str) -> str:
        line = [sys.executable, "-m", "deploy.cli", command, "--stack", self._name, *arguments]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(line)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def requests(home: Path) -> list[bytes]:
    """Held-out flights as the wire has them, all asked for at the moment whose features are in the store."""
    return [
        request_of(flight, as_of_us=BASE_MOMENT_US).SerializeToString() for flight in replay.board(home, 500).flights
    ]


def sender(channel: Channel, bodies: Sequence[bytes]) -> Send:
    """Sends them in turn, with priorities in turn."""

    async def send(i: int) -> str:
        metadata = (("x-priority", PRIORITIES[i % len(PRIORITIES)]),)
        try:
            answer = await channel.unary(METHOD, bodies[i % len(bodies)], timeout_s=TIMEOUT_S, metadata=metadata)
        except CalleeError as error:
            return error.code.name
        return "degraded" if PredictResponse.FromString(answer).HasField("degradation") else "ok"

    return send


async def light(channel: Channel, bodies: Sequence[bytes], seconds: float) -> Record:
    return await open_loop(sender(channel, bodies), constant(RATE, int(RATE * seconds)))


async def saturated(channel: Channel, bodies: Sequence[bytes], seconds: float) -> Record:
    return await closed_loop(sender(channel, bodies), CALLERS, seconds)


async def measure(
    target: str, pids: Mapping[str, int], bodies: Sequence[bytes], rounds: int, seconds: float
) -> dict[str, list[tuple[dict[str, float], Record]]]:
    """For each load, by round: milliseconds of CPU per request of each process, and how the requests ended."""
    found: dict[str, list[tuple[dict[str, float], Record]]] = defaultdict(list)
    channel = open_channel(target)
    try:
        await saturated(channel, bodies, 2.0)  # connections, caches, batch sizes
        for _, (name, load) in itertools.product(range(rounds), (("light", light), ("saturated", saturated))):
            before = cpu_s(pids)
            record = await load(channel, bodies, seconds)
            after = cpu_s(pids)
            spent = {process: (after[process] - before[process]) * 1000 / record.sent for process in pids}
            found[name].append((spent, record))
    finally:
        await channel.close()
    return found


def rows(found: Mapping[str, list[tuple[dict[str, float], Record]]], pids: Mapping[str, int]) -> list[Row]:
    goals = {"light": LIGHT_GOAL_MS, "saturated": SATURATED_GOAL_MS}
    labels = {"light": f"{RATE} requests/s", "saturated": f"{CALLERS} callers"}
    made: list[Row] = []
    for name, runs in found.items():
        load = labels[name]
        for process in pids:
            cpu = statistics.median(spent[process] for spent, _ in runs)
            made.append(fact(f"CPU per Predict, {process}, {load}", cpu, "ms"))
        total = statistics.median(sum(spent.values()) for spent, _ in runs)
        made.append(at_most(f"CPU per Predict, all processes, {load}", total, goals[name], "ms"))
        records = [record for _, record in runs]
        made.append(fact(f"requests/s, {load}", statistics.median(r.sent / r.elapsed_s for r in records), "requests/s"))
        for share, label in ((0.5, "P50"), (0.99, "P99")):
            worst = statistics.median(percentile(r.latencies_s, share) for r in records) * 1000
            made.append(fact(f"latency {label}, {load}", worst, "ms"))
        bad = sum(r.sent - r.endings.get("ok", 0) for r in records)
        made.append(at_most(f"answers not ok, {load}", bad, 0, "answers"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round instead of three")
    parser.add_argument("--json", action="store_true", help="accepted for scripts; the last line is JSON anyway")
    parser.add_argument("--mesh", type=Path, help="another description of the flights mesh")
    options = parser.parse_args()
    rounds, seconds = (1, 5.0) if options.quick else (3, 15.0)
    home = Path(os.environ.get("TENFOLD_HOME", ".tenfold"))
    with Stack("bench-mesh", options.mesh) as stack:
        status = stack.status()
        pids = {str(p["replica"]): int(p["pid"]) for p in status["processes"]}  # type: ignore[attr-defined]
        idle = usage(pids)
        found = asyncio.run(measure(str(status["ingress"]), pids, requests(home), rounds, seconds))
        made = rows(found, pids)
        made += [fact(f"memory idle, {name}", spent.pss_mb, "MiB") for name, spent in idle.items()]
        made.append(at_most("memory idle, all processes", sum(u.pss_mb for u in idle.values()), IDLE_GOAL_MB, "MiB"))
    emit("mesh", made)


if __name__ == "__main__":
    main()
