"""Stopping a stack so that every call in flight is answered, or at once."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.local import health
from deploy.local.control import Supervisor, kill_tree, wait_gone
from deploy.local.folders import RunFolder
from deploy.local.state import State, clean_up

DRAIN_WITHIN_S = 10.0
STOP_WITHIN_S = 60.0
_ACTIVE = re.compile(r"^http\.(?!admin)\S*downstream_rq_active: (\d+)$", re.MULTILINE)


def stop(run: RunFolder, state: State) -> None:
    """Drains the gateway, then stops everything in reverse order of starting. What does not stop in time is killed."""
    drain(state.topology.admin)
    if state.supervisor is not None:
        with Supervisor(state.control) as supervisor:
            supervisor.shut_down()
        if not wait_gone(state.supervisor, STOP_WITHIN_S):
            kill_tree(state.supervisor)
    clean_up(run)


def kill(run: RunFolder, state: State) -> None:
    """Ends everything now. Calls in flight are lost."""
    with _undisturbed():
        if state.supervisor is not None:
            kill_tree(state.supervisor)
            wait_gone(state.supervisor, 5.0)
        clean_up(run)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """^C and SIGTERM wait: a kill that was cut short would leave a stopped supervisor and whatever it holds.

    Handlers rather than a mask: gRPC's threads would take a signal that only this one blocks.
    """
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def drain(admin: str, within_s: float = DRAIN_WITHIN_S) -> bool:
    """Lets the gateway take no new connections, tells clients to go, and waits for the calls in flight.

    Only the ingress closes: a call in flight still needs the egress. Returns whether nothing is in flight any more;
    a gateway that does not answer has nothing in flight.
    """
    until = time.monotonic() + within_s
    try:
        health.admin(admin, "POST", "/drain_listeners?inboundonly")
        health.admin(admin, "POST", "/healthcheck/fail")  # every answer from here on asks its client to reconnect
        while (active := _active(admin)) and time.monotonic() < until:
            time.sleep(0.05)
    except OSError:
        return True
    return active == 0


def _active(admin: str) -> int:
    _, text = health.admin(admin, "GET", "/stats?filter=downstream_rq_active$")
    return sum(int(count) for count in _ACTIVE.findall(text))
