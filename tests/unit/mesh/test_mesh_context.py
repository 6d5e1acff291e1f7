from __future__ import annotations

import math
import time
from collections.abc import Iterable

import pytest

from services.mesh.context import caller_of, is_sampled, metadata_of, on_behalf_of
from services.resilience.call import Caller, Priority

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"


class Context:
    """What a server knows of a call."""

    def __init__(self, remaining_s: float | None, *metadata: tuple[str, str | bytes]) -> None:
        self._remaining_s, self._metadata = remaining_s, metadata

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        return self._metadata or None

    def time_remaining(self) -> float | None:
        return self._remaining_s


def test_a_caller_is_read_from_metadata_and_deadline() -> None:
    before = time.monotonic()
    metadata = (
        ("x-priority", "critical"),
        ("x-tenant", b"acme"),
        ("x-cohort", "canary"),
        ("traceparent", SAMPLED),
        ("other", "x"),
    )
    caller = caller_of(Context(2.0, *metadata))
    assert before + 2.0 <= caller.deadline <= time.monotonic() + 2.0
    assert (caller.priority, caller.tenant, caller.cohort) == (Priority.CRITICAL, "acme", "canary")
    assert caller.traceparent == SAMPLED


@pytest.mark.parametrize("remaining_s", [None, 9.2e9])
def test_a_caller_who_says_nothing_displaces_nobody_and_waits_for_ever(remaining_s: float | None) -> None:
    assert caller_of(Context(remaining_s)) == Caller(Priority.BACKGROUND, math.inf, "public", "", "")


@pytest.mark.parametrize("label", ["", "CRITICAL", "urgent", b"\xff"])
def test_an_unknown_priority_is_background(label: str | bytes) -> None:
    assert caller_of(Context(None, ("x-priority", label))).priority is Priority.BACKGROUND


@pytest.mark.parametrize("label", ["x" * 257, "a\nb", "\u2708", b"\xff", "   "])
def test_a_label_that_cannot_travel_counts_as_not_said(label: str | bytes) -> None:
    names = ("x-tenant", "x-cohort", "traceparent")
    assert caller_of(Context(None, *((name, label) for name in names))) == Caller()


def test_spaces_around_a_label_are_none_of_its_own() -> None:
    assert caller_of(Context(None, ("x-tenant", "  acme "))).tenant == "acme"


def test_metadata_goes_on_as_it_came_less_the_deadline() -> None:
    caller = Caller(Priority.STANDARD, 17.0, "acme", "canary", SAMPLED)
    metadata = metadata_of(caller, ("x-shed-reason", "deadline"))
    assert metadata[-1] == ("x-shed-reason", "deadline")
    assert caller_of(Context(None, *metadata)) == Caller(Priority.STANDARD, math.inf, "acme", "canary", SAMPLED)


def test_what_a_caller_does_not_have_is_not_sent() -> None:
    assert metadata_of(Caller()) == (("x-priority", "background"), ("x-tenant", "public"))


def test_a_batch_of_one_travels_as_its_member() -> None:
    caller = Caller(Priority.STANDARD, 1.0, "acme", "canary", SAMPLED)
    assert on_behalf_of([caller]) is caller


def test_a_batch_has_the_highest_priority_the_latest_deadline_and_the_first_sampled_trace() -> None:
    callers = [
        Caller(Priority.BACKGROUND, 5.0, "acme", traceparent=UNSAMPLED),
        Caller(Priority.CRITICAL, 1.0, "acme", traceparent=SAMPLED),
        Caller(Priority.STANDARD, 9.0, "acme", traceparent=SAMPLED.replace("0af", "1af")),
    ]
    assert on_behalf_of(callers) == Caller(Priority.CRITICAL, 9.0, "acme", "", SAMPLED)


def test_a_batch_of_several_tenants_says_so() -> None:
    assert on_behalf_of([Caller(tenant="a"), Caller(tenant="b")]).tenant == "mixed"


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [(SAMPLED, True), (UNSAMPLED, False), (SAMPLED[:-1] + "3", True), ("", False), (SAMPLED[:-1], False)],
)
def test_sampled_is_bit_0_of_the_flags(traceparent: str, sampled: bool) -> None:
    assert is_sampled(traceparent) is sampled
