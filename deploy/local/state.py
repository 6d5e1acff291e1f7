"""What is known of a running stack, in one file: who holds it, what it consists of, where it listens."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from deploy.local.folders import RunFolder, option, remove_sockets_folder
from gateway.topology import Topology


class StackError(Exception):
    """The stack cannot do what was asked; the message says why, for a person."""


class Probe(StrEnum):
    """How to ask a process whether it can work."""

    PING = "ping"  # Valkey's
    GRPC = "grpc"  # grpc.health.v1
    READY = "ready"  # Envoy's admin page


class Component(Struct, frozen=True):
    """A process of the stack.

    name: its own, "router-0". service: what it is a replica of. stage: of starting, from 0; stages stop in reverse.
    address: where it listens. asked_at: where `probe` asks, mostly the same.
    start_within_s, stop_within_s: patience, seconds; a process that stops later than that is killed.
    """

    name: str
    service: str
    stage: int
    command: list[str]
    address: str
    probe: Probe
    asked_at: str
    environ: dict[str, str] = {}
    start_within_s: float = 30.0
    stop_within_s: float = 8.0


class Process(Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same number.

    created: when it started, seconds since 1970 UTC as the kernel counts.
    """

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, psutil.Process(pid).create_time())

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # a clock that is set while it runs moves create_time by that much; a reused number differs by far more
            return abs(process.create_time() - self.created) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class State(Struct, frozen=True):
    """A stack that runs, or is being started or stopped.

    starter: the `tenfold up` that started it. supervisor: restarts what dies; None while it is not there yet.
    control: the supervisor's socket. sockets: the folder of all Unix sockets.
    store: of the features, as TENFOLD_STORE has it.
    """

    stack: str
    mesh: str
    mesh_file: str
    home: str
    started_us: int
    starter: Process
    sockets: str
    control: str
    store: str
    topology: Topology
    components: list[Component]
    detached: bool = False
    supervisor: Process | None = None

    @property
    def alive(self) -> bool:
        return self.supervisor.alive if self.supervisor is not None else self.starter.alive

    def addresses(self, service: str) -> list[str]:
        return list(self.topology.replicas[service])


def write(run: RunFolder, state: State) -> None:
    """Replaces the file at once, so that nobody reads half of it."""
    new = run.state.with_suffix(".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2))
    new.replace(run.state)


def read(run: RunFolder) -> State | None:
    """What the file says, also of a stack that is gone; None where there is no file that can be read."""
    try:
        return msgspec.json.decode(run.state.read_bytes(), type=State)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def running(run: RunFolder) -> State:
    """Raises StackError where the stack does not run."""
    state = read(run)
    if state is None or not state.alive:
        raise StackError(
            f"no stack {run.stack!r} is running here ({run.path}); start it with `tenfold up{option(run.stack)}`"
        )
    return state


def clean_up(run: RunFolder) -> None:
    """Removes what a stack that is gone has left: its sockets and its state. Logs and data stay."""
    if (state := read(run)) is not None:
        remove_sockets_folder(Path(state.sockets))
    run.state.unlink(missing_ok=True)


@contextmanager
def claimed(run: RunFolder) -> Iterator[None]:
    """The right to start this stack, until its state is written. Cleans up after a stack that is gone.

    Raises StackError where it runs already, or is being started.
    """
    run.make()
    with run.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"stack {run.stack!r} is being started by somebody else") from None
        state = read(run)
        if state is not None and state.alive:
            holder = state.supervisor or state.starter
            raise StackError(
                f"stack {run.stack!r} runs already (process {holder.pid}, {state.topology.ingress}); "
                f"stop it with `tenfold down{option(run.stack)}`, or give this one another name with --stack"
            )
        clean_up(run)
        yield


def starter() -> Process:
    return Process.of(os.getpid())


def now_us() -> int:
    return time.time_ns() // 1000
