"""Which tier answers: the cheapest that is good enough and in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.mesh.meshfile import Tier
from services.resilience.errors import Reason


@dataclass(slots=True)
class Candidate:
    """A tier as it stands now.

    expected_s: time to an answer with what waits now, seconds.
    ready: whether the router knows how to feed it. open: whether its circuit breaker refuses.
    """

    tier: Tier
    expected_s: float
    ready: bool = True
    open: bool = False

    @property
    def usable(self) -> bool:
        return self.ready and not self.open


@dataclass(frozen=True, slots=True)
class Choice:
    """tier: what should answer; None leaves it to fallback.

    reason: why the answer is less than what was asked for; None where it is not. why: the same for a person.
    """

    tier: Tier | None
    reason: Reason | None
    why: str


def choose(candidates: Sequence[Candidate], required: float, remaining_s: float, pinned: str = "") -> Choice:
    """The tier for a request.

    candidates: the model's tiers, cheapest first. required: the least quality that is good enough.
    remaining_s: until the answer is due, seconds. pinned: a tier's name, or empty.
    """
    if pinned:
        return _pinned(next(entry for entry in candidates if entry.tier.name == pinned))
    best: Candidate | None = None
    for candidate in candidates:
        if not candidate.usable or candidate.expected_s > remaining_s:
            continue
        if candidate.tier.quality >= required:
            return Choice(candidate.tier, None, f"the cheapest of quality {required:g} or better that is in time")
        if best is None or candidate.tier.quality > best.tier.quality:
            best = candidate
    reason, why = _why_not(candidates, required, remaining_s)
    return Choice(best.tier if best else None, reason, why)


def verdict(candidate: Candidate, choice: Choice, required: float, remaining_s: float) -> str:
    """Why `candidate` was chosen or not, for a person."""
    if choice.tier is not None and candidate.tier.name == choice.tier.name:
        return choice.why if choice.reason is None else f"the best that can answer in time: {choice.why}"
    if not candidate.ready:
        return "the inference service does not offer its model, or its features are unknown"
    if candidate.open:
        return "its circuit breaker is open"
    if candidate.tier.quality < required:
        return f"its quality {candidate.tier.quality:g} is below {required:g}"
    if candidate.expected_s > remaining_s:
        return f"it is expected to take {candidate.expected_s * 1000:.0f} ms of {remaining_s * 1000:.0f} ms left"
    return "a cheaper tier is good enough"


def _pinned(candidate: Candidate) -> Choice:
    name = candidate.tier.name
    if not candidate.ready:
        return Choice(None, Reason.DEPENDENCY_FAILED, f"pinned tier {name!r} cannot be served now")
    if candidate.open:
        return Choice(None, Reason.CIRCUIT_OPEN, f"the circuit breaker of pinned tier {name!r} is open")
    return Choice(candidate.tier, None, "pinned by the request")


def _why_not(candidates: Sequence[Candidate], required: float, remaining_s: float) -> tuple[Reason, str]:
    """What kept every tier that is good enough from answering: the milder reason where there are several."""
    enough = [entry for entry in candidates if entry.tier.quality >= required]
    if late := [entry for entry in enough if entry.usable]:
        quickest = min(entry.expected_s for entry in late)
        return (
            Reason.DEADLINE,
            f"quality {required:g} takes {quickest * 1000:.0f} ms of {remaining_s * 1000:.0f} ms left",
        )
    names = ", ".join(entry.tier.name for entry in enough)
    if any(entry.open for entry in enough):
        return Reason.CIRCUIT_OPEN, f"the circuit breaker of {names} is open"
    return Reason.DEPENDENCY_FAILED, f"{names} cannot be served now"
