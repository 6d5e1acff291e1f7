"""Who may try at all: the shape that admission and circuit breakers share."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from services.resilience.call import Priority
from services.resilience.errors import Reason, Refused


class Outcome(enum.Enum):
    """What a call that was let in says of the callee.

    IGNORED: nothing. It was shed, cancelled, or had too little time to be a fair trial.
    """

    OK = "ok"
    FAILED = "failed"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Refusal:
    """retry_after_s: when trying again makes sense, seconds."""

    reason: Reason
    retry_after_s: float

    def error(self, callee: str) -> Refused:
        """The refusal as an error that names `callee`."""
        detail = f"{callee}: {self.reason.label}, for {self.retry_after_s:.1f} s more"
        return Refused(self.reason, detail, self.retry_after_s)


class Permit(Protocol):
    def release(self, outcome: Outcome) -> None:
        """Once, however the call ended."""
        ...


class Gate(Protocol):
    def try_enter(self, priority: Priority) -> Permit | Refusal: ...
