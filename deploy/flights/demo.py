"""`tenfold demo`: a real mesh answers held-out flights, then loses a service and keeps answering."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.flights import replay
from deploy.flights.ask import request_of
from deploy.local import control, status, terminal
from deploy.local.folders import RunFolder
from deploy.local.state import StackError, State
from deploy.local.stop import stop
from deploy.local.up import Wanted, bring_up
from loadtest.driver import percentile
from loadtest.traces import commands as traces
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.mesh.channels import Channel, open_channel
from services.mesh.context import sampled_traceparent
from services.mesh.errors import CalleeError
from tenfold.common.v1.call_pb2 import Reason
from tenfold.router.v1.router_pb2 import PredictResponse

METHOD = "/tenfold.router.v1.RouterService/Predict"
FLIGHTS, FLIGHTS_WITH_A_FAULT, RATE = 500, 240, 40.0
KILL_AT = 40  # the flight of the second part before which inference is killed
TIMEOUT_S = 1.0
MIX = ("critical",) * 3 + ("standard",) * 4 + ("background",) * 3
"""Priorities in turn: three in ten critical, four standard, three background."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one flight, and when.

    probability: NaN where it failed. failure: the status's name, empty for none. at_s: on the clock of perf_counter.
    """

    label: int
    at_s: float
    latency_s: float
    probability: float = math.nan
    tier: str = ""
    cost_usd: float = 0.0
    degraded: str = ""
    source: str = ""
    failure: str = ""

    @property
    def by(self) -> str:
        """Who answered, or how the call failed."""
        return self.failure or self.tier or f"fallback: {self.source}"


def run(home: Path, *, keep: bool = False) -> int:
    """The whole demonstration. keep: leave the mesh running. Returns the exit status."""
    console = terminal.wide_console()
    with _own_stack(home, console, keep) as state:
        return asyncio.run(_demonstrate(home, state, console))


@contextmanager
def _own_stack(home: Path, console: Console, keep: bool) -> Iterator[State]:
    """A mesh of our own, under a name that no other stack of this folder has."""
    mesh_file = Path(__file__).with_name("tenfold.toml")
    wanted = Wanted(mesh_file, stack=f"demo-{os.getpid()}", home=home, detach=keep)
    with terminal.Progress() as progress:
        running = bring_up(wanted, progress)
    terminal.print_table(running.state, status.rows(running.state))
    try:
        yield running.state
    finally:
        if keep:
            console.print(f"left running: tenfold down --stack {wanted.stack}")
        else:
            stop(running.run, running.state)
            running.daemon.wait()


async def _demonstrate(home: Path, state: State, console: Console) -> int:
    board = replay.board(home, FLIGHTS + FLIGHTS_WITH_A_FAULT)
    async with _clients(state) as (channel, store):
        console.print("\n[bold]Flights of November and December 2013, which no model saw[/bold]")
        calm = await _fly(board, range(FLIGHTS), channel, store)
        _print_summary(console, calm)
        _print_worth(console, home)
        await _print_trace(console, state, board.flights[FLIGHTS - 1], channel)

        console.print("\n[bold]kill -9 of the only inference process, while flights go on[/bold]")
        second = range(FLIGHTS, FLIGHTS + FLIGHTS_WITH_A_FAULT)
        killed_at = math.nan

        def kill() -> None:
            nonlocal killed_at
            _kill(state, "inference-0")
            killed_at = time.perf_counter()

        faulted = await _fly(board, second, channel, store, before={FLIGHTS + KILL_AT: kill})
        _print_fault(console, faulted, killed_at)
    failed = [answer for answer in (*calm, *faulted) if answer.failure]
    return 1 if failed or any(answer.degraded for answer in calm) else 0


@asynccontextmanager
async def _clients(state: State) -> AsyncIterator[tuple[Channel, OnlineStore]]:
    channel = open_channel(state.topology.ingress)
    try:
        async with Valkey(state.store) as valkey:
            await valkey.connected(timeout_s=5.0)
            yield channel, OnlineStore(ValkeyTable(valkey), state.mesh)
    finally:
        await channel.close()


async def _fly(
    board: replay.Board,
    numbers: range,
    channel: Channel,
    store: OnlineStore,
    before: Mapping[int, Callable[[], None]] | None = None,
) -> list[Answered]:
    """Asks about the flights at a steady rate. Each one's features are stored first, as the stream would have."""
    answers: list[Answered] = []
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"{RATE:.0f} flights a second", total=len(numbers))

        async def one(i: int) -> None:
            answers.append(await _ask(channel, board.flights[i], MIX[i % len(MIX)]))
            progress.advance(bar)

        async with asyncio.TaskGroup() as group:
            for at, i in enumerate(numbers):
                await asyncio.sleep(max(0.0, start + at / RATE - time.perf_counter()))
                if before and (action := before.get(i)):
                    action()
                for write in board.writes[i]:
                    await store.write(write.schema, [write.entity_id], write.event_us, write.values[None, :])
                group.create_task(one(i))
    return answers


async def _ask(channel: Channel, flight: replay.Flight, priority: str, traceparent: str = "") -> Answered:
    metadata = (("x-priority", priority), *((("traceparent", traceparent),) if traceparent else ()))
    body = request_of(flight).SerializeToString()
    began = time.perf_counter()
    try:
        reply = PredictResponse.FromString(await channel.unary(METHOD, body, timeout_s=TIMEOUT_S, metadata=metadata))
    except CalleeError as error:
        now = time.perf_counter()
        return Answered(flight.label, now, now - began, failure=error.code.name)
    now = time.perf_counter()
    degraded = reply.HasField("degradation")
    return Answered(
        label=flight.label,
        at_s=now,
        latency_s=now - began,
        probability=reply.outputs[0].values[0],
        tier=reply.served_by.tier,
        cost_usd=reply.cost_usd,
        degraded=Reason.Name(reply.degradation.reason).removeprefix("REASON_").lower() if degraded else "",
        source=reply.degradation.source,
    )


def auc(answers: Sequence[Answered]) -> float:
    """Area under the ROC curve of the answers there are: the chance that a late flight was given a higher
    probability than one in time; ties count half. NaN where one kind is absent.
    """
    given = [answer for answer in answers if not answer.failure]
    late = np.array([answer.probability for answer in given if answer.label])
    in_time = np.array([answer.probability for answer in given if not answer.label])
    if not len(late) or not len(in_time):
        return math.nan
    difference = late[:, None] - in_time[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def _print_summary(console: Console, answers: Sequence[Answered]) -> None:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("tier", "answers", "share", "AUC", "P50", "P99", "$ per 1,000"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for by, _ in Counter(answer.by for answer in answers).most_common():
        _add_row(table, by, [answer for answer in answers if answer.by == by], len(answers))
    _add_row(table, "all", answers, len(answers))
    console.print(table)
    degraded = sum(bool(answer.degraded) for answer in answers)
    failed = sum(bool(answer.failure) for answer in answers)
    console.print(f"answered {len(answers) - failed} of {len(answers)}, degraded {degraded}, failed {failed}")


def _print_worth(console: Console, home: Path) -> None:
    """What the tiers are worth on every flight of the two months: 500 are few to judge a model by."""
    judged = json.loads((home / "flights" / "evaluation.json").read_text())
    tiers = ", ".join(f"{name} {tier['auc']:.3f}" for name, tier in judged["tiers"].items())
    console.print(f"AUC on all {judged['test_flights']:,} flights of these months: {tiers}", highlight=False)


def _add_row(table: Table, name: str, answers: Sequence[Answered], of: int) -> None:
    latencies = [answer.latency_s * 1000 for answer in answers]
    cost = 1000 * sum(answer.cost_usd for answer in answers) / len(answers)
    table.add_row(
        name,
        str(len(answers)),
        f"{len(answers) / of:.0%}",
        f"{auc(answers):.3f}",
        f"{percentile(latencies, 0.5):.1f} ms",
        f"{percentile(latencies, 0.99):.1f} ms",
        f"{cost:.4f}",
    )


async def _print_trace(console: Console, state: State, flight: replay.Flight, channel: Channel) -> None:
    """One more request, recorded because its traceparent asks for it, as a tree."""
    traceparent = sampled_traceparent()
    trace = traceparent.split("-")[1]
    await _ask(channel, flight, "critical", traceparent)
    spans = await asyncio.to_thread(traces.find, RunFolder.of(state.stack, Path(state.home)).traces, trace)
    console.print(f"\n[bold]One request[/bold] (tenfold traces show {trace[:8]} --stack {state.stack})")
    traces.print_tree(spans)


def _kill(state: State, name: str) -> None:
    """With SIGKILL, for real."""
    with control.Supervisor(state.control) as supervisor:
        pid = supervisor.seen()[name].pid
    if not pid:
        raise StackError(f"{name} is not running")
    os.kill(pid, signal.SIGKILL)


def _print_fault(console: Console, answers: Sequence[Answered], killed_at: float) -> None:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("answered by", "reason", "answers", "AUC", "P99"):
        table.add_column(name, justify="left" if name in ("answered by", "reason") else "right")
    kinds = Counter((a.by, a.degraded) for a in answers)
    for (by, reason), count in kinds.most_common():
        members = [a for a in answers if (a.by, a.degraded) == (by, reason)]
        p99 = percentile([a.latency_s * 1000 for a in members], 0.99)
        table.add_row(by, reason or "-", str(count), f"{auc(members):.3f}", f"{p99:.1f} ms")
    console.print(table)
    degraded = sum(bool(answer.degraded) for answer in answers)
    failed = sum(bool(answer.failure) for answer in answers)
    mended_s = max((a.at_s - killed_at for a in answers if a.degraded or a.failure), default=0.0)
    console.print(
        f"answered {len(answers) - failed} of {len(answers)}: {degraded} degraded and marked so, {failed} failed; "
        f"the last of them {mended_s:.1f} s after the kill"
    )
