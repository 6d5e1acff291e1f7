from __future__ import annotations

import pytest

from services.resilience.breaker import Breaker, BreakerPermit, Rules, State
from services.resilience.call import Priority
from services.resilience.errors import Reason
from services.resilience.gate import Outcome, Refusal


class Ticks:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


class Bench:
    """A breaker, its clock and the states it reported."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.clock = Ticks()
        self.states: list[State] = []
        self.breaker = Breaker(rules or Rules(), self.clock, self.states.append)

    def enter(self) -> BreakerPermit:
        permit = self.breaker.try_enter(Priority.STANDARD)
        assert not isinstance(permit, Refusal), f"refused: {permit}"
        return permit

    def call(self, outcome: Outcome, took_s: float = 0.0) -> None:
        permit = self.enter()
        self.clock.pass_s(took_s)
        permit.release(outcome)

    def calls(self, outcome: Outcome, count: int) -> None:
        for _ in range(count):
            self.call(outcome)

    def open_it(self) -> None:
        self.calls(Outcome.FAILED, 5)
        assert self.breaker.state is State.OPEN


def test_a_run_of_failures_opens_and_calls_are_refused_with_the_time_left() -> None:
    bench = Bench()
    bench.calls(Outcome.FAILED, 4)
    assert bench.breaker.state is State.CLOSED
    bench.call(Outcome.FAILED)
    bench.clock.pass_s(0.25)
    assert bench.breaker.try_enter(Priority.CRITICAL) == Refusal(Reason.CIRCUIT_OPEN, 0.75)
    assert bench.breaker.refuses


def test_one_success_ends_a_run() -> None:
    bench = Bench()
    for _ in range(4):
        bench.calls(Outcome.OK, 10)
        bench.calls(Outcome.FAILED, 4)
    assert bench.breaker.state is State.CLOSED


def test_half_of_twenty_calls_failing_opens_without_any_run() -> None:
    bench = Bench()
    for _ in range(9):
        bench.calls(Outcome.OK, 1)
        bench.calls(Outcome.FAILED, 1)
    bench.call(Outcome.OK)
    assert bench.breaker.state is State.CLOSED
    bench.call(Outcome.FAILED)
    assert bench.breaker.state is State.OPEN


def test_calls_older_than_the_window_no_longer_count() -> None:
    bench = Bench()
    for _ in range(9):
        bench.calls(Outcome.OK, 1)
        bench.calls(Outcome.FAILED, 1)
    bench.clock.pass_s(11)
    bench.calls(Outcome.OK, 1)
    bench.calls(Outcome.FAILED, 1)
    assert bench.breaker.state is State.CLOSED


def test_slow_calls_count_as_failures_even_when_they_succeed() -> None:
    bench = Bench(Rules(slow_s=0.5))
    for _ in range(5):
        bench.call(Outcome.OK, took_s=0.4)
    assert bench.breaker.state is State.CLOSED
    for _ in range(5):
        bench.call(Outcome.OK, took_s=0.6)
    assert bench.breaker.state is State.OPEN


def test_sheds_and_cancelled_calls_never_open_it_and_never_hide_failures() -> None:
    bench = Bench()
    bench.calls(Outcome.IGNORED, 1000)
    assert bench.breaker.state is State.CLOSED
    for _ in range(5):
        bench.call(Outcome.FAILED)
        if bench.breaker.state is State.CLOSED:
            bench.call(Outcome.IGNORED)
    assert bench.breaker.state is State.OPEN


def test_after_the_pause_one_call_tries_and_each_success_lets_one_more_in() -> None:
    bench = Bench(Rules(probes=7))
    bench.open_it()
    bench.clock.pass_s(1.0)
    assert not bench.breaker.refuses
    first = bench.enter()
    assert bench.breaker.refuses
    assert isinstance(bench.breaker.try_enter(Priority.CRITICAL), Refusal)
    first.release(Outcome.OK)
    pair = [bench.enter(), bench.enter()]
    assert isinstance(bench.breaker.try_enter(Priority.CRITICAL), Refusal)
    for permit in pair:
        permit.release(Outcome.OK)
    four = [bench.enter() for _ in range(4)]
    assert isinstance(bench.breaker.try_enter(Priority.CRITICAL), Refusal)
    for permit in four:
        permit.release(Outcome.OK)
    assert bench.breaker.state is State.CLOSED
    assert bench.states == [State.OPEN, State.HALF_OPEN, State.CLOSED]


def test_a_failed_trial_doubles_the_pause_up_to_its_limit_and_closing_resets_it() -> None:
    bench = Bench(Rules(open_s=1, max_open_s=4, probes=1))
    bench.open_it()
    for pause_s in (1, 2, 4, 4):
        bench.clock.pass_s(pause_s - 0.01)
        assert bench.breaker.refuses
        bench.clock.pass_s(0.02)
        bench.call(Outcome.FAILED)
        assert bench.breaker.state is State.OPEN
    bench.clock.pass_s(4.01)
    bench.call(Outcome.OK)
    assert bench.breaker.state is State.CLOSED
    bench.open_it()
    bench.clock.pass_s(1.0)
    assert not bench.breaker.refuses


def test_a_trial_that_says_nothing_frees_its_place_for_another() -> None:
    bench = Bench()
    bench.open_it()
    bench.clock.pass_s(1.0)
    bench.call(Outcome.IGNORED)
    assert bench.breaker.state is State.HALF_OPEN
    bench.enter()


def test_a_slow_trial_opens_again() -> None:
    bench = Bench()
    bench.open_it()
    bench.clock.pass_s(1.0)
    bench.call(Outcome.OK, took_s=0.6)
    assert bench.breaker.state is State.OPEN


def test_calls_let_in_before_it_opened_do_not_speak_for_the_callee_afterwards() -> None:
    bench = Bench()
    old = [bench.enter() for _ in range(10)]
    bench.open_it()
    bench.clock.pass_s(1.0)
    trial = bench.enter()
    for permit in old:
        permit.release(Outcome.FAILED)
    assert bench.breaker.state is State.HALF_OPEN
    trial.release(Outcome.OK)
    assert not bench.breaker.refuses


def test_a_permit_is_released_once() -> None:
    permit = Bench().enter()
    permit.release(Outcome.OK)
    with pytest.raises(RuntimeError, match="once"):
        permit.release(Outcome.OK)


def test_a_refusal_names_the_callee_and_when_to_come_back() -> None:
    error = Refusal(Reason.CIRCUIT_OPEN, 0.75).error("feature")
    assert (error.reason, error.retry_after_s) == (Reason.CIRCUIT_OPEN, 0.75)
    assert str(error) == "feature: circuit_open, for 0.8 s more"


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("bad_share", 0.0),
        ("bad_share", 1.1),
        ("min_calls", 0),
        ("bad_run", 0),
        ("probes", 0),
        ("window_s", 0.0),
        ("slow_s", -1.0),
        ("open_s", 0.0),
        ("max_open_s", 0.5),
    ],
)
def test_rules_that_cannot_work_are_refused_by_name(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{knob} must be .* got {value}"):
        Rules(**{knob: value})  # type: ignore[arg-type]
