"""Who runs next, with whom, and who has no chance any more.

There is no timer: when the model is free it takes what waits. A batch is drawn in order of priority, then deadline,
and never grows so long that its most urgent member would be late. Whoever cannot be answered in time hears so at
once, when it arrives or when its batch would start, so that no work is wasted on it.

Nothing here waits or runs anything: every decision takes the time as an argument.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.resilience.call import Priority
from services.resilience.errors import DeadlineExceeded, Reason, Refused

T = TypeVar("T")

SAFETY = 1.2  # a run may take this much longer than predicted before its members are late
INLINE_BELOW_S, THREAD_ABOVE_S = 0.0005, 0.001


@dataclass(frozen=True, slots=True)
class Limits:
    """max_rows: of one batch. max_waiting: members in the queue.

    max_run_s: what a batch of several members may take at most, so that an urgent call that arrives while it runs
    does not wait long; beyond some ten rows, larger batches win little on a CPU.
    """

    max_rows: int = 256
    max_waiting: int = 1024
    max_run_s: float = 0.04

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.max_run_s > 0:
            raise ValueError(f"max_run_s must be above 0 s, got {self.max_run_s}")


class Estimate:
    """How long a run of so many rows takes: a fixed cost and a cost per row, fitted to recent runs.

    A least-squares line over exponentially weighted observations. Where all recent runs had about the same size
    the slope cannot be seen, so it stays and the fixed cost alone follows.
    """

    def __init__(self, memory: int = 32) -> None:
        """memory: about how many runs are remembered."""
        self._weight = 1 / memory
        self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._seen = 0
        self.fixed_s = 0.0
        self.per_row_s = 0.0

    def of(self, rows: int) -> float:
        """Predicted seconds; 0 before anything was observed."""
        return self.fixed_s + self.per_row_s * rows

    def observe(self, rows: int, seconds: float) -> None:
        """A run that succeeded. A stall of the machine must not look like a slow model: it counts at most fourfold."""
        if self._seen > 3:
            seconds = min(seconds, 4 * self.of(rows) + 1e-5)
        self._seen += 1
        w = max(self._weight, 1 / self._seen)
        self._rows += w * (rows - self._rows)
        self._seconds += w * (seconds - self._seconds)
        self._rows_rows += w * (rows * rows - self._rows_rows)
        self._rows_seconds += w * (rows * seconds - self._rows_seconds)
        variance = self._rows_rows - self._rows * self._rows
        if variance > 0.01 * self._rows * self._rows:
            slope = (self._rows_seconds - self._rows * self._seconds) / variance
            self.per_row_s = min(max(slope, 0.0), self._seconds / self._rows)
        self.fixed_s = max(self._seconds - self.per_row_s * self._rows, 0.0)


class Placement:
    """Whether a run belongs on the event loop's thread.

    Handing a run to another thread and back costs 50 to 100 microseconds: more than a small model's run. A long run
    on the loop keeps every other call waiting. Between the two bounds, what was decided last stays.
    """

    def __init__(self, inline: bool = False) -> None:
        self._inline = inline

    def inline(self, predicted_s: float) -> bool:
        self._inline = predicted_s < (THREAD_ABOVE_S if self._inline else INLINE_BELOW_S)
        return self._inline


@dataclass(slots=True, eq=False)
class Member(Generic[T]):
    """One call that waits.

    rows: its share of a batch. key: only members with equal keys share one.
    deadline, arrived: on the caller's clock, seconds.
    """

    work: T
    rows: int
    priority: Priority
    deadline: float
    arrived: float
    key: object = ()
    place: tuple[int, float, int] = field(default=(0, 0.0, 0), init=False)


@dataclass(slots=True)
class Batch(Generic[T]):
    """late: left the queue because their deadline cannot hold. predicted_s: how long `members` will run."""

    members: list[Member[T]]
    late: list[Member[T]]
    rows: int
    predicted_s: float


class Batcher(Generic[T]):
    """The queue in front of one model that runs one batch at a time."""

    def __init__(self, limits: Limits, estimate: Estimate) -> None:
        self.limits, self.estimate = limits, estimate
        self._waiting: list[tuple[tuple[int, float, int], Member[T]]] = []  # sorted: who runs first stands first
        self._rows = 0
        self._arrivals = 0
        self._free_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, member: Member[T], now: float) -> Member[T] | None:
        """Queues a member; returns whoever lost their place to it.

        Raises DeadlineExceeded where it cannot be answered in time, and Refused where the queue is full of calls
        that come before it.
        """
        self._arrivals += 1
        member.place = (-member.priority, member.deadline, self._arrivals)
        position = bisect.bisect(self._waiting, (member.place,))
        expected_s = self.expected_s(member.rows, position, now)
        if now + expected_s > member.deadline:
            left_ms, expected_ms = max(member.deadline - now, 0) * 1e3, expected_s * 1e3
            raise DeadlineExceeded(f"an answer takes about {expected_ms:.1f} ms, the deadline is in {left_ms:.1f} ms")
        displaced = None
        if len(self._waiting) >= self.limits.max_waiting:
            if position == len(self._waiting):
                raise Refused(Reason.QUEUE_FULL, f"{len(self._waiting)} calls wait already", expected_s)
            displaced = self._waiting.pop()[1]
            self._rows -= displaced.rows
        self._waiting.insert(position, (member.place, member))
        self._rows += member.rows
        return displaced

    def remove(self, member: Member[T]) -> bool:
        """Takes out a member whose caller went away; False if it is not waiting any more."""
        position = bisect.bisect_left(self._waiting, (member.place,))
        if position == len(self._waiting) or self._waiting[position][1] is not member:
            return False
        del self._waiting[position]
        self._rows -= member.rows
        return True

    def expected_s(self, rows: int, position: int, now: float) -> float:
        """Seconds until an answer to so many rows that would stand at `position` of the queue."""
        ahead_s = 0.0
        if position:
            most = self._best_rows()
            ahead_s = self._rows * position / len(self._waiting) * self.estimate.of(most) / most
        return max(self._free_at - now, 0.0) + ahead_s + self.estimate.of(rows)

    def next_batch(self, now: float) -> Batch[T]:
        """What to run now; no members where nothing waits. The model is free: its last run was `finished`."""
        batch: Batch[T] = Batch([], [], 0, 0.0)
        kept: list[tuple[tuple[int, float, int], Member[T]]] = []
        tightest = float("inf")
        seen = 0
        for entry in self._waiting:
            member = entry[1]
            if now + SAFETY * self.estimate.of(member.rows) > member.deadline:
                batch.late.append(member)
            elif batch.members and not self._fits(batch, member, min(tightest, member.deadline), now):
                if not self._may_skip(batch, member, tightest, now):
                    break
                kept.append(entry)
            else:
                batch.members.append(member)
                batch.rows += member.rows
                tightest = min(tightest, member.deadline)
            seen += 1
        self._waiting[:seen] = kept
        self._rows -= batch.rows + sum(member.rows for member in batch.late)
        batch.predicted_s = self.estimate.of(batch.rows)
        self._free_at = now + batch.predicted_s
        return batch

    def finished(self, rows: int, seconds: float | None) -> None:
        """The batch is over. seconds: how long it ran; None where that says nothing, because the run failed."""
        self._free_at = 0.0
        if seconds is not None:
            self.estimate.observe(rows, seconds)

    def _fits(self, batch: Batch[T], member: Member[T], deadline: float, now: float) -> bool:
        """Whether the batch with this member is still one batch, and everyone in time."""
        rows = batch.rows + member.rows
        if member.key != batch.members[0].key or rows > self.limits.max_rows:
            return False
        predicted_s = self.estimate.of(rows)
        return predicted_s <= self.limits.max_run_s and now + SAFETY * predicted_s <= deadline

    def _may_skip(self, batch: Batch[T], member: Member[T], tightest: float, now: float) -> bool:
        """Whether those behind one that does not fit might still: it is of another kind, or itself too urgent."""
        return member.key != batch.members[0].key or self._fits(batch, member, tightest, now)

    def _best_rows(self) -> int:
        """Rows of the batches that a long queue is served in."""
        rows, spare_s = self.limits.max_rows, self.limits.max_run_s - self.estimate.fixed_s
        if self.estimate.per_row_s > 0:
            rows = min(rows, int(spare_s / self.estimate.per_row_s))
        return max(rows, 1)
