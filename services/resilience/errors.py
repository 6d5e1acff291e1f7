"""The few ways in which a call can end badly. `services.mesh.errors` alone knows their gRPC status."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Reason(enum.IntEnum):
    """Why a call was refused or answered with less; numbers are those of tenfold.common.v1.Reason."""

    UNSPECIFIED = 0
    OVERLOADED = 1
    QUEUE_FULL = 2
    DEADLINE = 3
    CIRCUIT_OPEN = 4
    DEPENDENCY_FAILED = 5
    ROUTER_UNREACHABLE = 6
    FEATURES_UNAVAILABLE = 7
    DRAINING = 8

    @property
    def label(self) -> str:
        """As it labels metrics and metadata: "queue_full"."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str | None) -> Reason:
        """UNSPECIFIED for a label that is unknown or absent."""
        return _BY_LABEL.get(label or "", cls.UNSPECIFIED)


_BY_LABEL = {reason.label: reason for reason in Reason}


class CallError(Exception):
    """A foreseeable end of a call: the caller is told what it needs, and nothing else is harmed."""


class Refused(CallError):
    """Not attempted. Says nothing about the health of whoever refused.

    retry_after_s: when trying again makes sense; negative for never.
    """

    def __init__(self, reason: Reason, detail: str = "", retry_after_s: float = 0.1) -> None:
        super().__init__(detail or reason.label)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(CallError):
    """The deadline passed, or could not have held."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with one field: what was wrong, the value, what is allowed."""

    field: str
    description: str


class BadInput(CallError):
    """The request can never succeed as it is."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations: Sequence[Violation] = violations


class NotFound(CallError):
    """A model, view, tier or version that does not exist here."""


class Unavailable(CallError):
    """A dependency is down and nothing can stand in for it."""

    def __init__(self, detail: str, reason: Reason = Reason.DEPENDENCY_FAILED) -> None:
        super().__init__(detail)
        self.reason = reason
