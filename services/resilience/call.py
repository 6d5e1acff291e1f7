"""The shape of a call, and of everything that wraps one."""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Req = TypeVar("Req")
Res = TypeVar("Res")

Clock = Callable[[], float]
"""Seconds that only grow; `time.monotonic` outside of tests."""


class Priority(enum.IntEnum):
    """How much a request matters; numbers are those of tenfold.common.v1.Priority."""

    BACKGROUND = 1
    STANDARD = 2
    CRITICAL = 3

    @property
    def label(self) -> str:
        """As it travels in metadata: "critical", "standard", "background"."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str | None) -> Priority:
        """A caller who says nothing, or something unknown, displaces nobody: BACKGROUND."""
        return _BY_LABEL.get(label or "", cls.BACKGROUND)


_BY_LABEL = {priority.label: priority for priority in Priority}


@dataclass(frozen=True, slots=True)
class Caller:
    """What the mesh must know of a call to treat it fairly, apart from its request.

    deadline: on the clock of `time.monotonic`, seconds; infinite where the client set none.
    traceparent: W3C trace context as received, empty where there is none.
    degraded_reason: label of the Reason for which a stand-in is asked, empty where there is none.
    """

    priority: Priority = Priority.BACKGROUND
    deadline: float = float("inf")
    tenant: str = "public"
    cohort: str = ""
    traceparent: str = ""
    degraded_reason: str = ""

    def remaining_s(self, now: float) -> float:
        """Seconds until the deadline; never negative."""
        return max(0.0, self.deadline - now)

    def with_traceparent(self, traceparent: str) -> Caller:
        return replace(self, traceparent=traceparent)


@dataclass(frozen=True, slots=True)
class Call(Generic[Req]):
    """A request and its caller."""

    request: Req
    caller: Caller

    def expired(self, now: float | None = None) -> bool:
        return self.caller.deadline <= (time.monotonic() if now is None else now)


Handler = Callable[[Call[Req]], Awaitable[Res]]
Layer = Callable[[Handler[Req, Res]], Handler[Req, Res]]


def stack(*layers: Layer[Req, Res]) -> Layer[Req, Res]:
    """One layer from several, the first outermost."""

    def wrap(inner: Handler[Req, Res]) -> Handler[Req, Res]:
        for layer in reversed(layers):
            inner = layer(inner)
        return inner

    return wrap
