"""Runs one model's batches: on the event loop's thread where they are short, else on a thread of the model's own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from services.inference.backend import DeviceFault, ExecutionBackend, InputFault
from services.inference.batcher import Batch, Batcher, Estimate, Limits, Member, Placement
from services.inference.tensors import Inputs, Outputs, Signature
from services.resilience.call import Caller, Clock
from services.resilience.errors import BadInput, CallError, DeadlineExceeded, Reason, Refused, Unavailable, Violation

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Share:
    """One call's part of a batch: `rows` rows of `outputs` from row `start`.

    batch_rows: of the whole batch. queued_s: how long the call waited for it.
    """

    outputs: Outputs
    start: int
    rows: int
    batch_rows: int
    queued_s: float


@dataclass(slots=True)
class Total:
    """How often something happened and how long it took in all, seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class Statistics:
    """What a model version has done since it was loaded.

    rows, runs: answered, and executions that answered them. success, fail, queue: per call.
    gather, compute: per run: joining the inputs, and the model itself. by_rows: compute by batch size.
    last: time of the last answer, seconds since 1970; 0 before the first.
    """

    rows: int = 0
    runs: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    gather: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)
    by_rows: dict[int, Total] = field(default_factory=dict)
    last: float = 0.0


@dataclass(slots=True)
class Work:
    inputs: Inputs
    answer: asyncio.Future[Share]


@dataclass(slots=True)
class Outcome:
    """What became of one batch. parts: for each run, its members and what they got."""

    parts: list[tuple[list[Member[Work]], Outputs | Exception]]
    gather_s: float = 0.0
    compute_s: float = 0.0
    runs: int = 1


class Runner:
    """The queue of one model and its execution. Belongs to one event loop."""

    def __init__(
        self,
        backend: ExecutionBackend,
        signature: Signature,
        limits: Limits,
        estimate: Estimate,
        clock: Clock = time.monotonic,
    ) -> None:
        self.statistics = Statistics()
        self._backend, self._signature, self._clock = backend, signature, clock
        # without a batch dimension every call is a batch
        alone = Limits(1, limits.max_waiting, limits.max_run_s)
        self._batcher: Batcher[Work] = Batcher(limits if signature.max_batch else alone, estimate)
        self._placement = Placement()
        self._thread: ThreadPoolExecutor | None = None
        self._running = self._woken = False
        self._idle: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._batcher)

    async def infer(self, inputs: Inputs, caller: Caller) -> Share:
        """The answer to one call. Cancelling it gives its place in the queue back.

        Raises DeadlineExceeded, Refused, BadInput where the model cannot run on these inputs, or Unavailable.
        """
        loop = asyncio.get_running_loop()
        now = self._clock()
        work = Work(inputs, loop.create_future())
        member = Member(work, inputs.rows, caller.priority, caller.deadline, now, inputs.shapes)
        displaced = self._batcher.push(member, now)
        if displaced is not None:
            self._fail(displaced, Refused(Reason.QUEUE_FULL, "displaced by a call that comes first"))
        if not (self._running or self._woken):
            self._woken = True
            # in the next round of the loop, so that calls which arrived together run together
            loop.call_soon(self._step)
        try:
            return await work.answer
        except asyncio.CancelledError:
            self._batcher.remove(member)
            raise

    async def drain(self) -> None:
        """Returns when nothing waits and nothing runs."""
        while self._running or self._woken or len(self._batcher):
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await self._idle

    def close(self) -> None:
        """Gives the thread back; call it drained."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _step(self) -> None:
        """Starts what waits; the model is free."""
        self._woken = False
        self._start(self._next())

    def _next(self) -> Batch[Work] | None:
        batch = self._batcher.next_batch(self._clock())
        for member in batch.late:
            self._fail(member, DeadlineExceeded("the deadline would have passed before the answer"))
        return batch if batch.members else None

    def _start(self, batch: Batch[Work] | None) -> None:
        if batch is None:
            self._rest()
        elif self._placement.inline(batch.predicted_s):
            self._settle(batch, self._execute(batch.members), self._clock())
            if len(self._batcher):
                self._woken = True
                asyncio.get_running_loop().call_soon(self._step)  # the loop first takes in what arrived meanwhile
            else:
                self._rest()
        else:
            self._running = True
            self._submit(batch)

    def _submit(self, batch: Batch[Work]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        loop, started = asyncio.get_running_loop(), self._clock()

        def execute() -> None:
            outcome = self._execute(batch.members)
            try:
                loop.call_soon_threadsafe(self._finished, batch, outcome, started)
            except RuntimeError:
                log.debug("the loop was closed before a batch ended")

        self._thread.submit(execute)

    def _finished(self, batch: Batch[Work], outcome: Outcome, started: float) -> None:
        """Back on the loop. The next batch starts before this one's answers are handed out.

        It is drawn only now, not while this one ran: who arrived meanwhile and is urgent is in it, and the thread
        misses one hand-over, little beside the runs that are long enough to be here.
        """
        self._running = False
        self._observe(batch, outcome)
        following = self._next()
        if following is not None and not self._placement.inline(following.predicted_s):
            self._running = True
            self._submit(following)
            self._answer(batch, outcome, started)
        else:
            self._answer(batch, outcome, started)
            self._start(following)

    def _settle(self, batch: Batch[Work], outcome: Outcome, now: float) -> None:
        self._observe(batch, outcome)
        self._answer(batch, outcome, now - outcome.gather_s - outcome.compute_s)

    def _observe(self, batch: Batch[Work], outcome: Outcome) -> None:
        whole = len(outcome.parts) == 1 and not isinstance(outcome.parts[0][1], Exception)
        self._batcher.finished(batch.rows, outcome.gather_s + outcome.compute_s if whole else None)

    def _answer(self, batch: Batch[Work], outcome: Outcome, started: float) -> None:
        statistics, now = self.statistics, self._clock()
        for members, result in outcome.parts:
            start = 0
            for member in members:
                if isinstance(result, Exception):
                    self._fail(member, result)
                    continue
                waited = started - member.arrived
                statistics.success.add(now - member.arrived)
                statistics.queue.add(waited)
                if not member.work.answer.done():  # its caller may have left; the others still get theirs
                    member.work.answer.set_result(Share(result, start, member.rows, batch.rows, waited))
                start += member.rows
            if not isinstance(result, Exception):
                statistics.rows += start
        statistics.runs += outcome.runs
        statistics.gather.add(outcome.gather_s, outcome.runs)
        statistics.compute.add(outcome.compute_s, outcome.runs)
        statistics.by_rows.setdefault(batch.rows, Total()).add(outcome.compute_s)
        statistics.last = time.time()

    def _execute(self, members: list[Member[Work]]) -> Outcome:
        """Runs a batch. Where that fails, each member alone, so that only the one at fault gets an error."""
        outcome = Outcome([], runs=0)
        result = self._run([member.work.inputs for member in members], outcome)
        if isinstance(result, Exception) and len(members) > 1:
            outcome.parts += [([member], self._run([member.work.inputs], outcome)) for member in members]
        else:
            outcome.parts.append((members, result))
        return outcome

    def _run(self, batch: Sequence[Inputs], outcome: Outcome) -> Outputs | CallError:
        outcome.runs += 1
        started = joined = self._clock()
        try:
            feeds = self._signature.feeds(batch)
            joined = self._clock()
            arrays = self._backend.run(feeds)
            return Outputs(self._signature, arrays, sum(inputs.rows for inputs in batch))
        except InputFault as error:
            return BadInput(Violation("inputs", f"the model cannot run on them: {error}"))
        except (DeviceFault, ValueError) as error:
            log.warning("run failed", extra={"reason": str(error)})
            return Unavailable(f"the model failed: {error}")
        except Exception as error:
            log.exception("run failed")
            return Unavailable(f"the model failed: {type(error).__name__}")
        finally:
            outcome.gather_s += joined - started
            outcome.compute_s += self._clock() - joined

    def _fail(self, member: Member[Work], error: Exception) -> None:
        self.statistics.fail.add(self._clock() - member.arrived)
        if not member.work.answer.done():
            member.work.answer.set_exception(error)

    def _rest(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        self._idle = None
