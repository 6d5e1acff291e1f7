"""A circuit breaker: calls to a callee that keeps failing stop for a while, so that it and its callers recover.

It opens on a share of failed or slow calls, and on a run of them, which is what a callee that hangs looks like when
few calls fit into the window. After a pause it tries again with one call, and each success lets one more in at the
same time, so that a callee that is just back is not buried at once.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.resilience.call import Clock, Priority
from services.resilience.errors import Reason
from services.resilience.gate import Outcome, Refusal


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Rules:
    """When to open, and how to come back.

    bad_share: of the calls in the window, failed or slow, that opens; needs `min_calls` in the window.
    bad_run: failed or slow calls in a row that open.
    window_s: how far back calls count. slow_s: a call that took longer is as bad as a failed one.
    open_s: the first pause; it doubles up to `max_open_s` each time the callee is found to be still bad.
    probes: successes in a row that close.
    """

    bad_share: float = 0.5
    min_calls: int = 20
    bad_run: int = 5
    window_s: float = 10.0
    slow_s: float = 0.5
    open_s: float = 1.0
    max_open_s: float = 30.0
    probes: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.bad_share <= 1:
            raise ValueError(f"bad_share must be above 0 and at most 1, got {self.bad_share}")
        for name in ("min_calls", "bad_run", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("window_s", "slow_s", "open_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 s, got {getattr(self, name)}")
        if self.max_open_s < self.open_s:
            raise ValueError(f"max_open_s must be at least open_s, {self.open_s}, got {self.max_open_s}")


class Breaker:
    """A Gate in front of one callee. Belongs to one event loop."""

    def __init__(
        self,
        rules: Rules | None = None,
        clock: Clock = time.monotonic,
        on_change: Callable[[State], None] = lambda _: None,
    ) -> None:
        """on_change: told of every new state, once."""
        self._rules = rules or Rules()
        self._clock = clock
        self._on_change = on_change
        self._state = State.CLOSED
        self._generation = 0
        self._window = _Window(self._rules.window_s)
        self._run = 0
        self._pause_s = self._rules.open_s
        self._open_until = 0.0
        self._probing = 0
        self._proved = 0

    @property
    def state(self) -> State:
        return self._state

    @property
    def refuses(self) -> bool:
        """Whether a call would be refused now. Changes nothing."""
        if self._state is State.OPEN:
            return self._clock() < self._open_until
        return self._state is State.HALF_OPEN and self._probing > self._proved

    def try_enter(self, priority: Priority) -> BreakerPermit | Refusal:  # noqa: ARG002 - a Gate; all are equal here
        now = self._clock()
        if self._state is State.OPEN:
            if now < self._open_until:
                return Refusal(Reason.CIRCUIT_OPEN, self._open_until - now)
            self._become(State.HALF_OPEN)
        if self._state is State.HALF_OPEN:
            if self._probing > self._proved:
                return Refusal(Reason.CIRCUIT_OPEN, self._rules.open_s)
            self._probing += 1
        return BreakerPermit(self, self._generation, now)

    def settle(self, generation: int, entered: float, outcome: Outcome) -> None:
        """Counts a call that was let in at `entered`; called by its permit."""
        if generation != self._generation:
            return  # let in before the last change: it speaks of a callee as it was
        now = self._clock()
        bad = outcome is Outcome.FAILED or (outcome is Outcome.OK and now - entered > self._rules.slow_s)
        if self._state is State.HALF_OPEN:
            self._probing -= 1
            if bad:
                self._pause_s = min(2 * self._pause_s, self._rules.max_open_s)
                self._open(now)
            elif outcome is Outcome.OK:
                self._proved += 1
                if self._proved >= self._rules.probes:
                    self._pause_s = self._rules.open_s
                    self._become(State.CLOSED)
        elif outcome is not Outcome.IGNORED:
            self._run = self._run + 1 if bad else 0
            calls, bad_calls = self._window.count(now, bad)
            too_many = calls >= self._rules.min_calls and bad_calls >= self._rules.bad_share * calls
            if too_many or self._run >= self._rules.bad_run:
                self._open(now)

    def _open(self, now: float) -> None:
        self._open_until = now + self._pause_s
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self._state = state
        self._generation += 1
        self._window.clear()
        self._run = self._probing = self._proved = 0
        self._on_change(state)


class BreakerPermit:
    """A Permit of a Breaker."""

    __slots__ = ("_breaker", "_entered", "_generation", "_released")

    def __init__(self, breaker: Breaker, generation: int, entered: float) -> None:
        self._breaker, self._generation, self._entered = breaker, generation, entered
        self._released = False

    def release(self, outcome: Outcome) -> None:
        if self._released:
            raise RuntimeError("a permit is released once")
        self._released = True
        self._breaker.settle(self._generation, self._entered, outcome)


class _Window:
    """Calls and bad calls of the last `length_s` seconds, in tenths of it: memory does not grow with load."""

    def __init__(self, length_s: float) -> None:
        self._tenth_s = length_s / 10
        self._tenths: deque[tuple[int, list[int]]] = deque()

    def count(self, now: float, bad: bool) -> tuple[int, int]:
        """Adds one call; calls and bad calls in the window, this one included."""
        tenth = int(now // self._tenth_s)
        while self._tenths and self._tenths[0][0] <= tenth - 10:
            self._tenths.popleft()
        if not self._tenths or self._tenths[-1][0] != tenth:
            self._tenths.append((tenth, [0, 0]))
        latest = self._tenths[-1][1]
        latest[0] += 1
        latest[1] += bad
        return sum(counts[0] for _, counts in self._tenths), sum(counts[1] for _, counts in self._tenths)

    def clear(self) -> None:
        self._tenths.clear()
