"""A stack comes up whole, survives the death of each of its processes, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest

from deploy.flights import replay
from deploy.flights.replay import Flight
from deploy.local import health
from deploy.local.predict import EXAMPLE
from services.mesh import meshfile

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.mesh

SERVICES = ["valkey-0", "traces-0", "feature-0", "inference-0", "fallback-0", "router-0"]


def traces_of(stack: Stack) -> tuple[list[psutil.Process], Path]:
    """What must be gone later: the processes of a stack that is up, and the folder of its sockets."""
    found = stack.state
    assert found.supervisor is not None
    supervisor = psutil.Process(found.supervisor.pid)
    return [supervisor, *supervisor.children(recursive=True)], Path(found.sockets)


def assert_gone(stack: Stack, processes: list[psutil.Process], sockets: Path) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    until = time.monotonic() + 5
    while sockets.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not sockets.exists()
    assert not stack.run.state.exists()


def test_every_process_serves_within_a_gigabyte(stack: Stack) -> None:
    done = stack.tenfold("status", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    components = {row["component"] for row in told["processes"]}
    assert components == {*meshfile.SERVICES, "valkey", "traces", "gateway", "supervisor"}
    assert all(row["serving"] for row in told["processes"])
    assert sum(row["memory_mb"] for row in told["processes"]) < 1000


def test_a_prediction_is_answered_by_a_model_and_its_trace_tells_who_took_part(stack: Stack) -> None:
    done = stack.tenfold("predict", "--flight", EXAMPLE, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["degraded"], told["tier"]) == (False, "full")
    assert 0 <= told["outputs"]["late_probability"][0] <= 1
    assert told["features"]["ok"] > 50

    spans = json.loads(stack.tenfold("traces", "show", told["trace"], "--json").stdout)
    assert {span["service"] for span in spans} == {"gateway", "router", "feature", "inference"}
    tree = stack.tenfold("traces", "show", told["trace"][:12]).stdout
    assert "tier=full" in tree
    assert tree.index("router-0") < tree.index("feature-0") < tree.index("inference-0")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--flight", "ZZ1"], 1, "no flight 'ZZ1' leaves New York"),
        (["--flight", EXAMPLE, "--priority", "high"], 2, "must be one of"),
        (["--flight", EXAMPLE, "--timeout-ms", "0"], 2, "--timeout-ms"),
    ],
)
def test_a_question_that_makes_no_sense_gets_a_clear_line(
    stack: Stack, arguments: list[str], status: int, said: str
) -> None:
    done = stack.tenfold("predict", *arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("replica", SERVICES)
def test_a_process_that_is_killed_is_replaced_and_every_call_meanwhile_is_answered(
    stack: Stack, flight: Flight, replica: str
) -> None:
    ask = stack.client(flight)
    ask()
    before = stack.row(replica)
    os.kill(before.pid, signal.SIGKILL)
    answered = [ask() for _ in range(50)]  # an error would end the test
    assert all(answer.outputs[0].values for answer in answered)
    stack.wait(f"{replica} serves again", lambda: stack.row(replica).serving)
    after = stack.row(replica)
    assert after.pid != before.pid
    assert after.restarts == before.restarts + 1
    stack.wait("answers are whole again", lambda: not ask().HasField("degradation"))
    # the next death is to be the only one that the gateway has to cope with
    stack.wait("the gateway sees all", lambda: not health.unseen(stack.state.topology.admin))


def test_a_gateway_that_is_killed_is_replaced_and_answers_again(stack: Stack, flight: Flight) -> None:
    before = stack.row("gateway-0")
    os.kill(before.pid, signal.SIGKILL)

    def whole() -> bool:
        try:
            # over a new connection: gRPC's blocking client reconnects only while a call waits for it
            return not stack.client(flight)().HasField("degradation")
        except grpc.RpcError:
            return False

    stack.wait("the gateway answers again", whole)
    assert stack.row("gateway-0").pid != before.pid


def test_logs_are_told_by_service(stack: Stack) -> None:
    told = stack.tenfold("logs", "router").stdout
    assert "router-0 " in told
    assert "serving" in told
    assert "feature-0" not in told
    nobody = stack.tenfold("logs", "nobody")
    assert nobody.returncode == 1
    assert "no logs of 'nobody'" in nobody.stderr


def test_a_second_up_of_the_same_stack_is_refused_and_harms_nothing(stack: Stack) -> None:
    refused = stack.tenfold("up")
    assert refused.returncode == 1
    assert "stack 'tests' runs already" in refused.stderr
    assert all(row.serving for row in stack.rows())


def test_two_stacks_run_side_by_side_and_down_leaves_nothing_of_one(stack: Stack, other: Stack, flight: Flight) -> None:
    other.up()
    mine, theirs = stack.state, other.state
    assert mine.store != theirs.store
    for what in ("ingress", "egress", "admin", "otlp"):
        assert getattr(mine.topology, what) != getattr(theirs.topology, what)
    assert other.client(flight)().served_by.tier == "full"
    processes, sockets = traces_of(other)

    done = other.tenfold("down")

    assert done.returncode == 0, done.stderr
    assert_gone(other, processes, sockets)
    assert other.process is not None
    assert other.process.wait(10) == 0
    assert stack.client(flight)().served_by.tier == "full"


def test_calls_in_flight_when_a_stack_is_stopped_are_answered(other: Stack, flight: Flight) -> None:
    other.up()
    processes, sockets = traces_of(other)
    clients = [other.client(flight) for _ in range(8)]
    for ask in clients:
        ask()
    assert other.process is not None
    stopped_at = float("inf")
    lost, answered_late = [], 0

    def keep_asking(ask: Callable[[], object]) -> tuple[list[str], int]:
        """Until refused: errors of calls that began before the stop, and answers to calls that ended after it."""
        errors, late = [], 0
        while True:
            began = time.monotonic()
            try:
                ask()
            except grpc.RpcError as error:
                if began < stopped_at:
                    errors.append(f"{error.code()}: {error.details()}")
                return errors, late
            late += time.monotonic() > stopped_at

    with ThreadPoolExecutor(len(clients)) as pool:
        asking = [pool.submit(keep_asking, ask) for ask in clients]
        time.sleep(0.5)
        stopped_at = time.monotonic()
        other.process.send_signal(signal.SIGTERM)
        for done in asking:
            errors, late = done.result(60)
            lost += errors
            answered_late += late
    assert lost == []
    assert answered_late > 0  # there were calls in flight, or the test shows nothing
    assert other.process.wait(60) == 0
    assert_gone(other, processes, sockets)


def test_nothing_remains_of_a_stack_whose_up_is_killed_without_a_word(other: Stack) -> None:
    other.up()
    processes, sockets = traces_of(other)
    assert len(processes) >= 8
    assert other.process is not None
    other.process.kill()
    other.process.wait()
    assert_gone(other, processes, sockets)
    assert other.tenfold("status").returncode == 1


def test_a_second_request_to_stop_ends_everything_at_once(other: Stack) -> None:
    other.up()
    processes, sockets = traces_of(other)
    assert other.process is not None
    other.process.send_signal(signal.SIGINT)
    other.wait("it says that it stops", lambda: "^C again" in other.said.read_text())
    other.process.send_signal(signal.SIGINT)
    assert other.process.wait(10) == 130
    assert_gone(other, processes, sockets)


def test_a_stack_that_cannot_come_up_says_why_and_leaves_nothing(mesh_environ: dict[str, str], tmp_path: Path) -> None:
    text = (Path(replay.__file__).parent / "tenfold.toml").read_text()
    broken = tmp_path / "tenfold.toml"
    broken.write_text(text.replace('name = "flights"', 'name = "broken"').replace('"flights" #', '"nowhere" #'))
    command = [sys.executable, "-m", "deploy.cli", "up", "--stack", "broken"]
    done = subprocess.run(command, env=mesh_environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ended while it was starting; the end of" in done.stderr
    assert "must be a folder" in done.stderr  # what the process itself said
    assert str(Path(mesh_environ["TENFOLD_HOME"]) / "nowhere") in done.stderr
    run = Path(mesh_environ["TENFOLD_RUN"]) / "broken"
    assert not (run / "state.json").exists()
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if str(run) in " ".join(p.info["cmdline"] or ())]
    assert left == []
