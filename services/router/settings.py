"""Every knob of the router."""

from __future__ import annotations

from dataclasses import dataclass

from services.mesh.query import MAX_BATCH
from services.mesh.settings import PREFIX, ServiceSettings
from services.resilience.breaker import Rules
from services.resilience.coalesce import Limits


@dataclass(frozen=True, slots=True)
class RouterSettings(ServiceSettings):
    """Beside what every service needs.

    max_batch: requests that travel in one call to a callee. in_flight: calls to one callee at once.
    max_waiting: requests that wait for one callee; more are refused.
    callee_timeout_s: the most one call may take, whatever the client's deadline: a callee that hangs holds nobody
        for longer.
    slow_s: a call slower than this speaks against its callee as a failed one does.
    open_s: how long calls to a callee stop at first.
    refresh_s: how often the router looks whether a model or view changed without being told by an answer.
    remember_s: how often good answers are sent to fallback.
    shadow_every: one request in so many is also sent to fallback, off the critical path, so that it is known to
        work; 0 for none.
    ready_wait_s: how long a starting router waits to know its models before it answers with fallback alone.
    predict_batch_max: requests in one PredictBatch.
    """

    max_batch: int = 64
    in_flight: int = 2
    max_waiting: int = 1024
    callee_timeout_s: float = 1.0
    slow_s: float = 0.5
    open_s: float = 1.0
    refresh_s: float = 5.0
    remember_s: float = 1.0
    shadow_every: int = 100
    ready_wait_s: float = 10.0
    predict_batch_max: int = MAX_BATCH

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)
        if not self.egress:
            raise ValueError(f"{PREFIX}EGRESS must be the address of the gateway's egress listener, got ''")
        for name in ("max_batch", "in_flight", "max_waiting", "predict_batch_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{PREFIX}{name.upper()} must be at least 1, got {getattr(self, name)}")
        for name in ("callee_timeout_s", "slow_s", "open_s", "refresh_s", "remember_s", "ready_wait_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{PREFIX}{name.upper()} must be above 0 s, got {getattr(self, name)}")
        if self.shadow_every < 0:
            raise ValueError(f"{PREFIX}SHADOW_EVERY must be at least 0, got {self.shadow_every}")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.in_flight, self.max_waiting)

    @property
    def breaker(self) -> Rules:
        return Rules(slow_s=self.slow_s, open_s=self.open_s)
