"""One service that the router calls: through the egress listener, behind a breaker, under a span where sampled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.mesh.channels import Channel
from services.mesh.context import metadata_of, on_behalf_of
from services.mesh.errors import CalleeError
from services.mesh.telemetry import Recorded, Tracing
from services.resilience.breaker import Breaker, Rules, State
from services.resilience.call import Caller, Clock
from services.resilience.errors import CallError, DeadlineExceeded, Reason
from services.resilience.gate import Outcome, Refusal

log = logging.getLogger(__name__)

FAIR_TRIAL_S = 0.1  # a timeout shorter than this speaks of an impatient client, not of the callee
_MEAN_OF = 8  # calls over which the mean time of a call is smoothed


Judge = Callable[[CalleeError, float], Outcome]
"""What a status, of a call that was given so many seconds, says of the callee's health."""


@dataclass(frozen=True, slots=True)
class Network:
    """What every callee is reached through. timeout_s: the most that one call may take."""

    channel: Channel
    tracing: Tracing
    timeout_s: float
    rules: Rules
    clock: Clock = time.monotonic


class Callee:
    """name: for logs, errors and spans. mean_s: the smoothed time of a successful call, seconds."""

    def __init__(self, name: str, network: Network, judge: Judge | None = None) -> None:
        """judge: what a status says of this callee's health; `outcome_of` unless given."""
        self.name = name
        self._network = network
        self._judge = judge or outcome_of
        self.breaker = Breaker(network.rules, network.clock, self._report)
        self.mean_s = 0.0

    async def ask(
        self,
        method: str,
        request: bytes,
        callers: Iterable[Caller],
        *more: tuple[str, str],
        describe: Callable[[Recorded], None] = lambda _: None,
    ) -> bytes:
        """The answer of `method` ("/package.Service/Method") to a call made for all of `callers`.

        more: further metadata. describe: sets the attributes of the call's span; not called where none is recorded.
        Raises Refused where the breaker is open, CalleeError for every status but OK.
        """
        network = self._network
        caller = on_behalf_of(callers)
        entered = network.clock()
        timeout_s = min(caller.remaining_s(entered), network.timeout_s)
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{self.name}: no time was left to ask")
        permit = self.breaker.try_enter(caller.priority)
        if isinstance(permit, Refusal):
            raise permit.error(self.name)
        outcome = Outcome.IGNORED
        try:
            with network.tracing.client(method[1:], caller.traceparent) as span:
                if span.recording:
                    caller = caller.with_traceparent(span.traceparent)
                    describe(span)
                answer = await network.channel.unary(
                    method, request, timeout_s=timeout_s, metadata=metadata_of(caller, *more)
                )
            outcome = Outcome.OK
            took_s = network.clock() - entered
            self.mean_s = self.mean_s + (took_s - self.mean_s) / _MEAN_OF if self.mean_s else took_s
        except CalleeError as error:
            outcome = self._judge(error, timeout_s)
            raise
        else:
            return answer
        finally:
            permit.release(outcome)

    def wait_s(self, waiting: int, max_batch: int, in_flight: int) -> float:
        """How long what waits now will take to leave, seconds."""
        return waiting / (max_batch * in_flight) * self.mean_s

    def _report(self, state: State) -> None:
        level = logging.WARNING if state is State.OPEN else logging.INFO
        log.log(level, "breaker %s", state.value, extra={"callee": self.name})


_ANSWERED = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "ALREADY_EXISTS"})


def outcome_of(error: CalleeError, timeout_s: float) -> Outcome:
    """What a status says of the callee's health. timeout_s: the time that the call was given."""
    if error.refused or error.code.name == "CANCELLED":
        return Outcome.IGNORED
    if error.code.name == "DEADLINE_EXCEEDED" and timeout_s < FAIR_TRIAL_S:
        return Outcome.IGNORED
    return Outcome.OK if error.code.name in _ANSWERED else Outcome.FAILED


def reason_of(error: CallError) -> Reason:
    """Why an answer is less than what was asked for, after what went wrong."""
    if isinstance(error, DeadlineExceeded):
        return Reason.DEADLINE
    reason = getattr(error, "reason", Reason.DEPENDENCY_FAILED)
    return reason if isinstance(reason, Reason) else Reason.DEPENDENCY_FAILED
