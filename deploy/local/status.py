"""What runs of a stack, how well, and what it takes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from deploy.local import health
from deploy.local.control import Seen, Supervisor
from deploy.local.state import Component, State

SUPERVISOR = "supervisor"


@dataclass(frozen=True, slots=True)
class Row:
    """One process.

    state: "serving", or why it does not. restarts: since the stack came up. memory_mb: its share of physical memory
    (PSS: pages that processes share are divided between them), where the system tells, else RSS.
    """

    component: str
    replica: str
    pid: int
    state: str
    uptime_s: float
    restarts: int
    memory_mb: float
    address: str

    @property
    def serving(self) -> bool:
        return self.state == "serving"


def rows(state: State) -> list[Row]:
    """Every process of a stack that runs, in order of starting; its supervisor last."""
    with Supervisor(state.control) as supervisor:
        seen = supervisor.seen()
    with ThreadPoolExecutor(8) as pool:
        complaints = list(pool.map(health.complaint, state.components))
    found = [
        _row(component, seen[component.name], why) for component, why in zip(state.components, complaints, strict=True)
    ]
    if state.supervisor is not None:
        found.append(_supervisor_row(state, state.supervisor.pid))
    return found


def _row(component: Component, seen: Seen, complaint: str) -> Row:
    return Row(
        component=component.service,
        replica=component.name,
        pid=seen.pid,
        state=_state(seen, complaint),
        uptime_s=seen.uptime_s,
        restarts=max(0, seen.spawns - 1),
        memory_mb=memory_mb(seen.pid),
        address=component.address,
    )


def _state(seen: Seen, complaint: str) -> str:
    if not complaint:
        return "serving"
    if seen.pid == 0:
        return f"{seen.state.lower()} {seen.said}".strip()
    return complaint


def _supervisor_row(state: State, pid: int) -> Row:
    uptime_s = 0.0 if state.supervisor is None else time.time() - state.supervisor.created
    return Row(SUPERVISOR, SUPERVISOR, pid, "serving", uptime_s, 0, memory_mb(pid), f"unix:{state.control}")


def memory_mb(pid: int) -> float:
    """0 where there is no such process any more."""
    if pid == 0:
        return 0.0
    try:
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        used: int = getattr(memory, "pss", memory.rss)
    except psutil.Error:
        return 0.0
    return used / 2**20
