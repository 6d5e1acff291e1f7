"""Sends calls and records how each one ended.

Open loop: calls leave at their intended times whatever the answers do, and latency counts from the intended time,
so that a server that stalls cannot hide it by slowing its clients down. Closed loop: a fixed number of callers, each
waiting for its answer; finds what a server can do at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

Send = Callable[[int], Awaitable[str]]
"""Sends call number i and says how it ended: "ok", "degraded", or the name of a gRPC status."""


@dataclass(slots=True)
class Record:
    """What became of the calls of one run.

    endings: how many ended each way. latencies_s: seconds from the intended (open loop) or actual (closed loop) send.
    lag_s: seconds by which each call left late; large values say that the generator, not the server, was slow.
    """

    endings: dict[str, int] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def sent(self) -> int:
        return sum(self.endings.values())

    def note(self, ending: str, latency_s: float, lag_s: float = 0.0) -> None:
        self.endings[ending] = self.endings.get(ending, 0) + 1
        self.latencies_s.append(latency_s)
        self.lag_s.append(lag_s)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, nearest rank; NaN for none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def constant(rate: float, count: int) -> Iterator[float]:
    """`count` send times, seconds from the start, `rate` a second."""
    return (i / rate for i in range(count))


async def open_loop(send: Send, at_s: Iterable[float], max_pending: int = 10_000) -> Record:
    """Sends call i at the i-th time. Calls beyond `max_pending` unanswered ones are recorded as "unsent"."""
    record = Record()
    pending: set[asyncio.Task[None]] = set()
    start = time.perf_counter()

    async def one(i: int, intended: float) -> None:
        lag = time.perf_counter() - intended
        ending = await send(i)
        record.note(ending, time.perf_counter() - intended, lag)

    for i, offset in enumerate(at_s):
        intended = start + offset
        if (wait := intended - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if len(pending) >= max_pending:
            record.note("unsent", 0.0)
            continue
        task = asyncio.create_task(one(i, intended))
        pending.add(task)
        task.add_done_callback(pending.discard)
    while pending:
        await asyncio.wait(pending)
    record.elapsed_s = time.perf_counter() - start
    return record


async def closed_loop(send: Send, callers: int, seconds: float) -> Record:
    """`callers` send one call after another for `seconds`."""
    record = Record()
    numbers = iter(range(1 << 62))
    start = time.perf_counter()

    async def caller() -> None:
        while (before := time.perf_counter()) < start + seconds:
            ending = await send(next(numbers))
            record.note(ending, time.perf_counter() - before)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    record.elapsed_s = time.perf_counter() - start
    return record
