"""What a Predict costs: CPU time of every process of the mesh, per request.

Starts the flights mesh as `tenfold up` does, sends requests from this process (which is not counted), and reads each
process's CPU time from the kernel before and after. Two loads: 200 requests a second in an open loop, where calls come
one by one and little can be shared; and saturation, 64 callers in a closed loop.

Then every process in turn is ended with SIGKILL under load, and what became of the requests is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.flights import replay
from deploy.flights.ask import request_of
from deploy.flights.dataset import BASE_MOMENT_US
from loadtest.bench.processes import cpu_s
from loadtest.bench.report import Row, at_most, emit, fact
from loadtest.driver import Record, Send, closed_loop, constant, open_loop, percentile
from services.mesh.channels import Channel, open_channel
from services.mesh.errors import CalleeError
from tenfold.router.v1.router_pb2 import PredictResponse

METHOD = "/tenfold.router.v1.RouterService/Predict"
RATE, CALLERS = 200, 64
TIMEOUT_S = 2.0
PRIORITIES = ("critical", "standard", "standard", "background", "standard")
KILL_RATE, KILL_REQUESTS, KILL_AT = 100.0, 800, 100
MEND_WITHIN_S, SETTLE_S = 60.0, 3.0
NOT_ALL_SERVE = 3  # the exit status of `tenfold status` while a process is being replaced
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

    def pids(self) -> dict[str, int]:
        """Process name -> pid, of every process of the stack."""
        processes: Any = self.status()["processes"]
        return {str(process["replica"]): int(process["pid"]) for process in processes}

    def memory_mb(self) -> dict[str, float]:
        """Process name -> its share of physical memory, 2**20 bytes, as `tenfold status` has it."""
        processes: Any = self.status()["processes"]
        return {str(process["replica"]): float(process["memory_mb"]) for process in processes}

    def wait_until_serving(self) -> None:
        until = time.monotonic() + MEND_WITHIN_S
        while True:
            processes: Any = self.status()["processes"]
            if all(process["serving"] for process in processes):
                return
            if time.monotonic() > until:
                raise SystemExit(f"the mesh did not mend within {MEND_WITHIN_S:.0f} s: {processes}")

    def status(self) -> Mapping[str, object]:
        return dict(json.loads(self._tenfold("status", "--json")))

    def _tenfold(self, command: str, *arguments: str) -> str:
        line = [sys.executable, "-m", "deploy.cli", command, "--stack", self._name, *arguments]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode not in (0, NOT_ALL_SERVE):
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


class Killing:
    """A Send that kills a process before call number KILL_AT, and notes when calls ended otherwise than well."""

    def __init__(self, send: Send, pid: int) -> None:
        self._send = send
        self._pid = pid
        self._killed_at = self._bad_until = math.inf

    async def __call__(self, i: int) -> str:
        if i == KILL_AT:
            os.kill(self._pid, signal.SIGKILL)
            self._killed_at = self._bad_until = time.perf_counter()
        ending = await self._send(i)
        if ending != "ok":
            self._bad_until = time.perf_counter()
        return ending

    @property
    def mended_s(self) -> float:
        """From the kill to the last answer that was degraded or missing, seconds."""
        return self._bad_until - self._killed_at


async def kill_each(stack: Stack, target: str, bodies: Sequence[bytes]) -> list[Row]:
    """Kills every process but the supervisor in turn, under load, and lets the mesh mend before the next."""
    made: list[Row] = []
    channel = open_channel(target)
    try:
        for name in [name for name in stack.pids() if name != "supervisor"]:
            killing = Killing(sender(channel, bodies), stack.pids()[name])
            record = await open_loop(killing, constant(KILL_RATE, KILL_REQUESTS))
            degraded = record.endings.get("degraded", 0)
            answered = record.endings.get("ok", 0) + degraded
            made += [
                fact(f"kill -9 {name}: answered", answered, "requests", f"{KILL_REQUESTS} sent"),
                fact(f"kill -9 {name}: of these degraded and marked so", degraded, "requests"),
                fact(f"kill -9 {name}: failed", record.sent - answered, "requests"),
                fact(f"kill -9 {name}: whole again after", killing.mended_s, "s"),
            ]
            await asyncio.to_thread(stack.wait_until_serving)
            await asyncio.sleep(SETTLE_S)  # breakers close
    finally:
        await channel.close()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round instead of three")
    parser.add_argument("--json", action="store_true", help="accepted for scripts; the last line is JSON anyway")
    parser.add_argument("--no-kill", action="store_true", help="only the costs")
    parser.add_argument("--mesh", type=Path, help="another description of the flights mesh")
    options = parser.parse_args()
    rounds, seconds = (1, 5.0) if options.quick else (3, 15.0)
    home = Path(os.environ.get("TENFOLD_HOME", ".tenfold"))
    with Stack("bench-mesh", options.mesh) as stack:
        target, pids, bodies = str(stack.status()["ingress"]), stack.pids(), requests(home)
        idle = stack.memory_mb()
        found = asyncio.run(measure(target, pids, bodies, rounds, seconds))
        made = rows(found, pids)
        made += [fact(f"memory idle, {name}", used, "MiB") for name, used in idle.items()]
        if not options.no_kill:
            made += asyncio.run(kill_each(stack, target, bodies))
        made.append(at_most("memory idle, all processes", sum(idle.values()), IDLE_GOAL_MB, "MiB"))
    emit("mesh", made)


if __name__ == "__main__":
    main()
