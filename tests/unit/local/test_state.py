import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from deploy.local import state
from deploy.local.folders import RunFolder, make_sockets_folder, remove_sockets_folder
from deploy.local.state import Component, Probe, Process, StackError, State
from deploy.local.stop import kill
from gateway.topology import Topology
from services.mesh.meshfile import SERVICES

GONE = Process(pid=os.getpid(), created=1.0)  # our number, but a process of another time


def some_state(sockets: Path, starter: Process) -> State:
    replicas = {name: [f"unix:/{name}"] for name in SERVICES}
    topology = Topology("127.0.0.1:8080", "unix:/e", "127.0.0.1:9901", replicas, "unix:/o")
    component = Component("router-0", "router", 3, ["true"], "unix:/r", Probe.GRPC, "unix:/r", {"A": "b"})
    return State("s", "flights", "/m.toml", "/home", 1, starter, str(sockets), f"{sockets}/c", "unix:///v", topology,
                 [component])  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.of("s", tmp_path)
    run.make()
    return run


def test_what_was_written_is_read_back(run: RunFolder, tmp_path: Path) -> None:
    written = some_state(tmp_path, state.starter())
    state.write(run, written)
    assert state.read(run) == written
    assert state.running(run) == written


def test_a_second_start_of_a_running_stack_is_refused_and_told_where_it_runs(run: RunFolder, tmp_path: Path) -> None:
    state.write(run, some_state(tmp_path, state.starter()))
    with (
        pytest.raises(StackError, match=rf"runs already \(process {os.getpid()}, 127.0.0.1:8080\)"),
        state.claimed(run),
    ):
        pass


def test_two_starts_at_the_same_moment_are_told_apart(run: RunFolder) -> None:
    with (
        state.claimed(run),
        pytest.raises(StackError, match="being started by somebody else"),
        state.claimed(run),
    ):
        pass


def test_what_a_dead_stack_left_is_cleaned_up(run: RunFolder) -> None:
    sockets = make_sockets_folder()
    (sockets / "x.sock").touch()
    state.write(run, some_state(sockets, GONE))
    with state.claimed(run):
        assert not sockets.exists()
        assert state.read(run) is None


def test_a_stack_lives_as_long_as_its_supervisor_whatever_became_of_its_starter(run: RunFolder, tmp_path: Path) -> None:
    orphan = replace(some_state(tmp_path, GONE), supervisor=state.starter())
    assert orphan.alive
    assert not replace(orphan, supervisor=GONE).alive


def test_a_process_that_ended_but_was_not_waited_for_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = Process.of(child.pid)
    assert known.alive
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert not known.alive
    child.communicate()
    assert not known.alive


def test_a_state_file_that_cannot_be_read_is_no_stack(run: RunFolder) -> None:
    run.state.write_text('{"stack": 1}')
    assert state.read(run) is None
    with pytest.raises(StackError, match="no stack 's' is running"):
        state.running(run)


def test_only_a_folder_of_sockets_is_ever_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    remove_sockets_folder(precious)
    remove_sockets_folder(tmp_path / "tf-not-there")
    assert precious.exists()


def test_a_folder_of_sockets_is_private_and_short() -> None:
    sockets = make_sockets_folder()
    try:
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert len(str(sockets / "inference-63.sock")) < 100
    finally:
        remove_sockets_folder(sockets)
    assert not sockets.exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Ä", "-x", "x" * 42])
def test_a_name_that_is_no_folder_s_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a stack's name must be"):
        RunFolder.of(name, tmp_path)


class Interrupts(Process, frozen=True):
    """A process that ends while somebody presses ^C."""

    @property
    def alive(self) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return False


def test_an_interrupt_in_the_middle_of_a_kill_waits_until_nothing_is_left(run: RunFolder, tmp_path: Path) -> None:
    stack = some_state(tmp_path, state.starter())
    state.write(run, stack)
    with ThreadPoolExecutor(1) as other:
        other.submit(int).result()  # like a library's thread, it takes signals that this one might refuse
        with pytest.raises(KeyboardInterrupt):
            kill(run, replace(stack, supervisor=Interrupts(os.getpid(), 1.0)))
    assert not run.state.exists()


def test_what_is_advised_about_a_named_stack_names_it(run: RunFolder) -> None:
    with pytest.raises(StackError, match="start it with `tenfold up --stack s`"):
        state.running(run)
