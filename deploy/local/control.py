"""Driving a stack's supervisor."""

from __future__ import annotations

import http.client
import os
import signal
import time
import xmlrpc.client
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
from supervisor.xmlrpc import SupervisorTransport, UnixStreamHTTPConnection

from deploy.local.conf import group_of
from deploy.local.state import Component, Process, StackError

T = TypeVar("T")

ANSWERS_WITHIN_S = 5.0
_UNREACHABLE = (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError)


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as the supervisor sees it.

    state: supervisord's word: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL.
    pid: 0 where there is none. uptime_s: since its last start. spawns: how often it was started.
    """

    name: str
    state: str
    pid: int
    uptime_s: float
    spawns: int
    said: str = ""

    @property
    def fell(self) -> bool:
        """Whether it has ended, now or before, without being told to."""
        return self.spawns > 1 or self.state in ("BACKOFF", "EXITED", "FATAL")


class _Connection(UnixStreamHTTPConnection):  # type: ignore[misc]  # supervisor has no types
    """A supervisor that hangs must not hang us."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(ANSWERS_WITHIN_S)


class Supervisor:
    """XML-RPC to supervisord over its Unix socket."""

    def __init__(self, control: str) -> None:
        """control: the path of the socket."""
        self._transport = SupervisorTransport(None, None, f"unix://{control}")
        self._transport._get_connection = self._connection  # its own has no timeout
        self._control = control
        self._rpc: Any = xmlrpc.client.ServerProxy("http://localhost", transport=self._transport)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    def _connection(self) -> _Connection:
        connection = _Connection("localhost")
        connection.socketfile = self._control
        return connection

    def wait_until_there(self, still_there: Callable[[], bool], within_s: float = 10.0) -> None:
        """Returns when it answers. Raises StackError where it does not in time, or `still_there` says it is gone."""
        until = time.monotonic() + within_s
        while True:
            try:
                self._rpc.supervisor.getState()
            except _UNREACHABLE:
                self._transport.close()  # it would go on with a connection that never was
                if not still_there() or time.monotonic() > until:
                    raise StackError("the supervisor did not start") from None
                time.sleep(0.02)
            else:
                return

    def start(self, component: Component) -> None:
        """Returns at once; whether it came up is another question."""
        try:
            self._ask(lambda: self._rpc.supervisor.startProcess(f"{group_of(component)}:{component.name}", False))
        except xmlrpc.client.Fault as fault:
            raise StackError(f"{component.name}: {fault.faultString}") from None

    def seen(self) -> dict[str, Seen]:
        """Every process by name."""
        found = self._ask(self._rpc.supervisor.getAllProcessInfo)
        counts = self._ask(self._rpc.tenfold.counts)
        return {
            info["name"]: Seen(
                name=info["name"],
                state=info["statename"],
                pid=info["pid"],
                uptime_s=max(0, info["now"] - info["start"]) if info["pid"] else 0,
                spawns=counts.get(info["name"], 0),
                said=info["spawnerr"],
            )
            for info in found
        }

    def shut_down(self) -> None:
        """Asks for an ordered stop. Returns at once, also where nobody is there any more."""
        try:
            self._rpc.supervisor.shutdown()
        except (*_UNREACHABLE, xmlrpc.client.Fault):
            return

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except _UNREACHABLE as error:
            self._transport.close()
            raise StackError(f"the supervisor does not answer: {error}") from None


def kill_tree(process: Process) -> None:
    """SIGKILL to the process first, so that it starts nothing again, then to all below it."""
    if not process.alive:
        return
    try:
        top = psutil.Process(process.pid)
        top.suspend()  # what it starts from here on would be missed
        below = top.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for victim in (top, *below):
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_gone(process: Process, within_s: float) -> bool:
    """Whether it ended in time."""
    until = time.monotonic() + within_s
    while process.alive:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
