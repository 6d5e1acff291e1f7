"""A real mesh for tests: `tenfold up` as a person starts it, with the artefacts of the demonstration.

Artefacts are those of TENFOLD_HOME, or of .tenfold in the repository: made once, by whoever comes first. Run folders
are the test session's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from deploy.flights import replay
from deploy.flights.ask import request_of
from deploy.flights.replay import Flight
from deploy.local.folders import RunFolder
from deploy.local.plan import tied
from deploy.local.predict import EXAMPLE
from deploy.local.state import State, running
from deploy.local.status import Row, rows
from tenfold.router.v1 import router_pb2, router_pb2_grpc

REPOSITORY = Path(__file__).parents[2]
UP_WITHIN_S = 540.0  # the first time, with data, features and models to be made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("mesh") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


@dataclass
class Stack:
    """One stack and its `tenfold up`."""

    name: str
    environ: dict[str, str]
    folder: Path
    process: subprocess.Popen[str] | None = None
    channels: list[grpc.Channel] = field(default_factory=list)

    def up(self, *options: str) -> None:
        """Returns when every process is healthy."""
        command = tied([sys.executable, "-m", "deploy.cli", "up", "--stack", self.name, *options])
        environ = self.environ | {"TENFOLD_PARENT": str(os.getpid())}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, env=environ, cwd=self.folder, stdout=said, stderr=subprocess.STDOUT, text=True
            )
        until = time.monotonic() + UP_WITHIN_S
        while "\ncall 127.0.0.1:" not in self.said.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"`tenfold up` did not come up:\n{self.said.read_text()}")
            time.sleep(0.1)

    @property
    def said(self) -> Path:
        return self.folder / f"{self.name}.out"

    def tenfold(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `tenfold` command about this stack."""
        command = [sys.executable, "-m", "deploy.cli", *arguments, "--stack", self.name]
        return subprocess.run(command, env=self.environ, cwd=self.folder, capture_output=True, text=True, timeout=60)

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.environ["TENFOLD_RUN"]) / self.name)

    @property
    def state(self) -> State:
        """Raises StackError where it does not run."""
        return running(self.run)

    def rows(self) -> list[Row]:
        return rows(self.state)

    def row(self, replica: str) -> Row:
        return next(row for row in self.rows() if row.replica == replica)

    def wait(self, what: str, holds: Callable[[], bool], within_s: float = 30.0) -> None:
        until = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > until:
                pytest.fail(f"waited {within_s:.0f} s in vain until {what}:\n{self.rows()}")
            time.sleep(0.05)

    def client(self, flight: Flight) -> Callable[[], router_pb2.PredictResponse]:
        """Asks about a flight through the gateway, over one connection. Raises grpc.RpcError where it fails."""
        channel = grpc.insecure_channel(self.state.topology.ingress, [("grpc.use_local_subchannel_pool", 1)])
        self.channels.append(channel)
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request, metadata = request_of(flight), (("x-priority", "critical"),)

        def ask() -> router_pb2.PredictResponse:
            return stub.Predict(request, timeout=2, metadata=metadata)

        return ask

    def stop(self) -> int:
        """SIGTERM to `tenfold up`; its exit status."""
        for channel in self.channels:
            channel.close()
        self.channels.clear()
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.tenfold("down", "--now")
            raise


@pytest.fixture(scope="session")
def mesh_environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `tenfold` commands of this session run with."""
    home = os.environ.get("TENFOLD_HOME") or str(REPOSITORY / ".tenfold")
    return {
        **os.environ,
        "TENFOLD_HOME": str(Path(home).absolute()),
        "TENFOLD_RUN": str(tmp_path_factory.mktemp("run")),
    }


@pytest.fixture(scope="session")
def stack(mesh_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The flights mesh, up for the whole session. Tests may kill its processes, and leave it healthy."""
    stack = Stack("tests", mesh_environ, tmp_path_factory.mktemp("tests"))
    try:
        stack.up()
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="session")
def other_stack_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("other")


@pytest.fixture
def other(mesh_environ: dict[str, str], other_stack_files: Path) -> Iterator[Stack]:
    """A second stack, not up yet; stopped after the test. What it stored is there the next time."""
    stack = Stack("other", mesh_environ, other_stack_files)
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def flight(stack: Stack, mesh_environ: dict[str, str]) -> Flight:
    """A flight whose features are fresh."""
    found = replay.next_departure(Path(mesh_environ["TENFOLD_HOME"]), EXAMPLE, replay.BASE_MOMENT_US)
    assert found is not None
    return found
