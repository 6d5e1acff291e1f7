"""Calls that wait while another is in flight travel together.

There is no timer: a lone call leaves at once, and the batch grows by itself with load. What arrives while
`max_in_flight` batches are under way waits in a bounded queue, and the next batch takes from its front.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, cast

from services.resilience.call import Call, Clock, Req, Res
from services.resilience.errors import DeadlineExceeded, Reason, Refused

RunBatch = Callable[[Sequence[Call[Req]]], Awaitable[Sequence[Res | Exception]]]
"""Answers a batch in order. An exception in a place fails that member alone; one that is raised fails all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch: members of one batch. max_in_flight: batches at once. max_waiting: members in the queue."""

    max_batch: int = 64
    max_in_flight: int = 2
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_in_flight", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Coalescer(Generic[Req, Res]):
    """Turns single calls into batches. Belongs to one event loop."""

    def __init__(self, run: RunBatch[Req, Res], limits: Limits, clock: Clock = time.monotonic) -> None:
        self._run, self._limits, self._clock = run, limits, clock
        self._waiting: deque[tuple[Call[Req], asyncio.Future[Res]]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._under_way: dict[asyncio.Task[None], list[tuple[Call[Req], asyncio.Future[Res]]]] = {}
        self._abandoned: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self.batches = 0
        self.members = 0

    def __len__(self) -> int:
        """How many wait and are not yet under way."""
        return len(self._waiting)

    def submit(self, call: Call[Req]) -> asyncio.Future[Res]:
        """The future answer. Cancel it to give the place in the queue back.

        Raises Refused(QUEUE_FULL) at once where the queue has no room. The future fails with DeadlineExceeded
        where the call's deadline passed before its batch could leave.
        """
        if len(self._waiting) >= self._limits.max_waiting:
            self._forget_the_cancelled()
            if len(self._waiting) >= self._limits.max_waiting:
                raise Refused(Reason.QUEUE_FULL, f"{len(self._waiting)} calls wait already")
        answer: asyncio.Future[Res] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        if self._in_flight < self._limits.max_in_flight:
            self._start()
        return answer

    async def ask(self, call: Call[Req]) -> Res:
        """The answer to `call`, or DeadlineExceeded at its deadline.

        Whoever waits may be cancelled: the place in the queue is given back, and a batch in flight that nobody
        waits for any more is cancelled with it.
        """
        answer = self.submit(call)
        timer = None
        if call.caller.deadline != math.inf:
            timer = asyncio.get_running_loop().call_later(call.caller.remaining_s(self._clock()), _give_up, answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self._abandon()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def drain(self) -> None:
        """Returns when nothing waits and nothing is under way."""
        while self._workers:
            await asyncio.wait(self._workers)

    def _start(self) -> None:
        self._in_flight += 1
        worker = asyncio.get_running_loop().create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self.batches += 1
                self.members += len(batch)
                await self._settle(batch)
        finally:
            # in the same step that saw the queue empty: a task's done callback would run one step later, and a
            # call submitted between the two would wait for a worker that is gone
            self._in_flight -= 1

    def _next_batch(self) -> list[tuple[Call[Req], asyncio.Future[Res]]]:
        batch: list[tuple[Call[Req], asyncio.Future[Res]]] = []
        now = self._clock()
        while self._waiting and len(batch) < self._limits.max_batch:
            call, answer = self._waiting.popleft()
            if answer.done():  # cancelled while it waited
                continue
            if call.expired(now):
                answer.set_exception(DeadlineExceeded("the deadline passed while the call waited for its batch"))
                continue
            batch.append((call, answer))
        return batch

    async def _settle(self, batch: list[tuple[Call[Req], asyncio.Future[Res]]]) -> None:
        answers: Sequence[Res | Exception]
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        self._under_way[worker] = batch
        try:
            answers = await self._run([call for call, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"a batch of {len(batch)} got {len(answers)} answers")
        except Exception as error:  # noqa: BLE001 - every member must hear of it, whatever it was
            answers = [error] * len(batch)
        except BaseException:  # we are being cancelled: so are those who wait for us
            for _, reply in batch:
                reply.cancel()
            if worker not in self._abandoned or worker.cancelling() > 1:
                raise
            return  # only this batch was given up; those who wait behind it are still to be served
        finally:
            del self._under_way[worker]
            if worker in self._abandoned:
                self._abandoned.discard(worker)
                worker.uncancel()
        for (_, reply), answer in zip(batch, answers, strict=True):
            if reply.done():  # its caller went away while the batch was in flight; the others still get theirs
                continue
            if isinstance(answer, Exception):
                reply.set_exception(answer)
            else:
                reply.set_result(answer)

    def _abandon(self) -> None:
        """Cancels every batch in flight whose members all went away."""
        for worker, batch in self._under_way.items():
            if worker not in self._abandoned and all(reply.done() for _, reply in batch):
                self._abandoned.add(worker)
                worker.cancel()

    def _forget_the_cancelled(self) -> None:
        self._waiting = deque(entry for entry in self._waiting if not entry[1].done())


def _give_up(answer: asyncio.Future[Res]) -> None:
    if not answer.done():
        answer.set_exception(DeadlineExceeded("the deadline passed before the answer came"))
