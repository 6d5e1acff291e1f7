from __future__ import annotations

from services.mesh.meshfile import Tier
from services.resilience.errors import Reason
from services.router.policy import Candidate, choose, verdict


def candidate(name: str, quality: float, ms: float, *, ready: bool = True, is_open: bool = False) -> Candidate:
    return Candidate(Tier(name, name, quality, 1.0, ms), ms / 1000, ready, is_open)


LINEAR, SMALL, FULL = candidate("linear", 0.70, 5), candidate("small", 0.75, 10), candidate("full", 0.80, 50)
ALL = [LINEAR, SMALL, FULL]  # cheapest first


def chosen(candidates: list[Candidate], required: float, remaining_s: float, pinned: str = "") -> str:
    tier = choose(candidates, required, remaining_s, pinned).tier
    return tier.name if tier else ""


def test_the_cheapest_tier_that_is_good_enough_answers() -> None:
    assert [chosen(ALL, required, 1.0) for required in (0.6, 0.7, 0.71, 0.76)] == ["linear", "linear", "small", "full"]
    assert choose(ALL, 0.71, 1.0).reason is None


def test_a_tier_that_would_be_late_is_passed_over_for_a_dearer_one_that_is_good_enough() -> None:
    slow = candidate("linear", 0.70, 500)
    choice = choose([slow, SMALL, FULL], 0.7, 0.1)
    assert (choice.tier, choice.reason) == (SMALL.tier, None)


def test_when_none_that_is_good_enough_is_in_time_the_best_in_time_answers_degraded() -> None:
    choice = choose(ALL, 0.8, 0.02)
    assert choice.tier is SMALL.tier
    assert choice.reason is Reason.DEADLINE
    assert choice.why == "quality 0.8 takes 50 ms of 20 ms left"


def test_when_nothing_is_in_time_no_tier_is_asked() -> None:
    choice = choose(ALL, 0.7, 0.001)
    assert (choice.tier, choice.reason) == (None, Reason.DEADLINE)


def test_an_open_breaker_sends_a_request_to_the_next_good_enough_tier_or_degrades_it() -> None:
    broken = candidate("full", 0.80, 50, is_open=True)
    assert chosen([LINEAR, candidate("small", 0.75, 10, is_open=True), FULL], 0.71, 1.0) == "full"
    choice = choose([LINEAR, SMALL, broken], 0.8, 1.0)
    assert (choice.tier, choice.reason) == (SMALL.tier, Reason.CIRCUIT_OPEN)
    assert "full" in choice.why


def test_a_tier_that_cannot_be_served_yet_is_left_out() -> None:
    absent = candidate("full", 0.80, 50, ready=False)
    choice = choose([LINEAR, SMALL, absent], 0.8, 1.0)
    assert (choice.tier, choice.reason) == (SMALL.tier, Reason.DEPENDENCY_FAILED)


def test_a_pinned_tier_is_used_however_good_or_slow_it_is() -> None:
    choice = choose(ALL, 0.8, 0.001, "linear")
    assert (choice.tier, choice.reason) == (LINEAR.tier, None)


def test_a_pinned_tier_that_cannot_be_served_is_not_replaced() -> None:
    absent, broken = candidate("full", 0.8, 50, ready=False), candidate("full", 0.8, 50, is_open=True)
    assert choose([LINEAR, absent], 0.1, 1.0, "full").reason is Reason.DEPENDENCY_FAILED
    assert choose([LINEAR, broken], 0.1, 1.0, "full").reason is Reason.CIRCUIT_OPEN
    assert choose([LINEAR, absent], 0.1, 1.0, "full").tier is None


def test_every_verdict_says_what_decided() -> None:
    late, absent = candidate("late", 0.9, 5000), candidate("absent", 0.9, 1, ready=False)
    broken, dear = candidate("broken", 0.9, 1, is_open=True), candidate("dear", 0.9, 1)
    tiers = [LINEAR, late, absent, broken, SMALL, dear]
    choice = choose(tiers, 0.75, 1.0)
    assert [verdict(tier, choice, 0.75, 1.0) for tier in tiers] == [
        "its quality 0.7 is below 0.75",
        "it is expected to take 5000 ms of 1000 ms left",
        "the inference service does not offer its model, or its features are unknown",
        "its circuit breaker is open",
        "the cheapest of quality 0.75 or better that is in time",
        "a cheaper tier is good enough",
    ]
