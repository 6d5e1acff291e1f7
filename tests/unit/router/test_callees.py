from __future__ import annotations

import grpc
import pytest

from services.mesh.errors import CalleeError, callee_error
from services.resilience.breaker import State
from services.resilience.call import Caller, Priority
from services.resilience.errors import (
    BadInput,
    DeadlineExceeded,
    NotFound,
    Reason,
    Refused,
    Unavailable,
)
from services.resilience.gate import Outcome
from services.router.callees import Callee, outcome_of, reason_of
from services.router.standby import fallback_outcome
from tests.unit.router.fakes import FakeChannel, Ticks, callee

METHOD = "/a.B/C"


def caller(remaining_s: float, clock: Ticks, priority: Priority = Priority.STANDARD) -> Caller:
    return Caller(priority, clock() + remaining_s, "acme")


async def ask(to: Callee, *callers: Caller) -> bytes:
    return await to.ask(METHOD, b"request", callers)


async def test_a_call_gets_the_time_that_is_left_up_to_the_routers_own_limit() -> None:
    clock, channel = Ticks(), FakeChannel()
    channel.answers[METHOD] = bytes.upper
    to = callee(channel, clock)
    assert await ask(to, caller(0.3, clock)) == b"REQUEST"
    await ask(to, caller(50, clock))
    assert [asked[2] for asked in channel.asked] == [pytest.approx(0.3), 1.0]


async def test_a_call_for_several_goes_under_the_highest_priority_and_the_latest_deadline() -> None:
    clock, channel = Ticks(), FakeChannel()
    channel.answers[METHOD] = bytes.upper
    await ask(callee(channel, clock), caller(0.2, clock, Priority.CRITICAL), caller(0.6, clock))
    _, _, timeout_s, metadata = channel.asked[0]
    assert timeout_s == pytest.approx(0.6)
    assert metadata == {"x-priority": "critical", "x-tenant": "acme"}


async def test_without_time_left_nothing_is_asked() -> None:
    clock, channel = Ticks(), FakeChannel()
    with pytest.raises(DeadlineExceeded):
        await ask(callee(channel, clock), caller(-1, clock))
    assert channel.asked == []


async def test_an_open_breaker_refuses_without_asking() -> None:
    clock, channel = Ticks(), FakeChannel()
    channel.answers[METHOD] = grpc.StatusCode.UNAVAILABLE
    to = callee(channel, clock, "feature")
    for _ in range(5):
        with pytest.raises(CalleeError):
            await ask(to, caller(1, clock))
    with pytest.raises(Refused, match="feature: circuit_open") as refused:
        await ask(to, caller(1, clock))
    assert refused.value.reason is Reason.CIRCUIT_OPEN
    assert len(channel.asked) == 5
    clock.now += 1.0
    channel.answers[METHOD] = bytes.upper
    assert await ask(to, caller(1, clock)) == b"REQUEST"
    assert to.breaker.state is State.HALF_OPEN


async def test_what_waits_is_expected_to_leave_at_the_pace_of_recent_calls() -> None:
    clock, channel = Ticks(), FakeChannel()

    def slowly(request: bytes) -> bytes:
        clock.now += 0.02
        return request

    channel.answers[METHOD] = slowly
    to = callee(channel, clock)
    assert to.wait_s(1000, 64, 2) == 0.0
    await ask(to, caller(1, clock))
    assert to.wait_s(256, 64, 2) == pytest.approx(0.04)


def ended(code: grpc.StatusCode, *trailers: tuple[str, str]) -> CalleeError:
    return callee_error("callee", code, "m", trailers)


@pytest.mark.parametrize(
    ("code", "timeout_s", "outcome"),
    [
        (grpc.StatusCode.UNAVAILABLE, 1.0, Outcome.FAILED),
        (grpc.StatusCode.INTERNAL, 1.0, Outcome.FAILED),
        (grpc.StatusCode.UNKNOWN, 1.0, Outcome.FAILED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1.0, Outcome.FAILED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 0.01, Outcome.IGNORED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0, Outcome.IGNORED),
        (grpc.StatusCode.CANCELLED, 1.0, Outcome.IGNORED),
        (grpc.StatusCode.INVALID_ARGUMENT, 1.0, Outcome.OK),
        (grpc.StatusCode.NOT_FOUND, 1.0, Outcome.OK),
    ],
)
def test_a_status_speaks_of_health_only_where_it_can(code: grpc.StatusCode, timeout_s: float, outcome: Outcome) -> None:
    assert outcome_of(ended(code), timeout_s) is outcome


def test_a_fallback_that_has_no_answer_is_well_and_one_that_cannot_be_reached_is_not() -> None:
    explained = ended(grpc.StatusCode.UNAVAILABLE, ("x-shed-reason", "dependency_failed"))
    assert fallback_outcome(explained, 1.0) is Outcome.OK
    assert fallback_outcome(ended(grpc.StatusCode.UNAVAILABLE), 1.0) is Outcome.FAILED
    shed = ended(grpc.StatusCode.RESOURCE_EXHAUSTED, ("x-shed-reason", "queue_full"))
    assert fallback_outcome(shed, 1.0) is Outcome.IGNORED


def test_every_error_has_a_reason_to_tell() -> None:
    assert reason_of(DeadlineExceeded()) is Reason.DEADLINE
    assert reason_of(Refused(Reason.QUEUE_FULL)) is Reason.QUEUE_FULL
    assert reason_of(Unavailable("x", Reason.FEATURES_UNAVAILABLE)) is Reason.FEATURES_UNAVAILABLE
    assert reason_of(ended(grpc.StatusCode.RESOURCE_EXHAUSTED)) is Reason.OVERLOADED
    assert reason_of(ended(grpc.StatusCode.INTERNAL)) is Reason.DEPENDENCY_FAILED
    assert reason_of(NotFound("x")) is Reason.DEPENDENCY_FAILED
    assert reason_of(BadInput()) is Reason.DEPENDENCY_FAILED
