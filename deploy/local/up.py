"""Bringing a stack up: in stages, each healthy before the next, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from deploy.local import health, hooks, plan, state
from deploy.local.conf import common_environ, python, render
from deploy.local.control import Supervisor
from deploy.local.folders import RunFolder, make_sockets_folder, set_logs_aside
from deploy.local.logs import last_lines, readable
from deploy.local.ports import Ports
from deploy.local.state import Component, Process, StackError, State
from deploy.local.stop import kill
from services.mesh import meshfile
from services.mesh.meshfile import MeshFile

ASK_EVERY_S = 0.05
LOOK_EVERY_S = 0.5
"""How often it is asked whether a process can work, and looked whether it is still there."""
SEEN_WITHIN_S = 15.0
LINES_OF_A_FAILURE = 15


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `tenfold up` was asked for.

    port: of the ingress; None for the first free one from 8080. tcp: services on loopback ports rather than sockets.
    detach: the stack outlives the command.
    """

    mesh_file: Path
    stack: str
    home: Path
    port: int | None = None
    tcp: bool = False
    detach: bool = False


class Report(Protocol):
    """Whoever watches a stack come up."""

    def doing(self, what: str) -> None: ...
    def done(self, what: str, took_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Running:
    """A stack that came up. daemon: its supervisor, our child."""

    run: RunFolder
    state: State
    daemon: subprocess.Popen[bytes]


def bring_up(wanted: Wanted, report: Report) -> Running:
    """Returns when every process is healthy. Raises StackError or MeshFileError, and then nothing is left running."""
    mesh = meshfile.load(wanted.mesh_file)
    run = RunFolder.of(wanted.stack, wanted.home)
    with Ports() as ports:
        with state.claimed(run):
            prepare(mesh, wanted.home, report)
            set_logs_aside(run)
            planned = _plan(wanted, mesh, run, ports)
            state.write(run, planned)
        started = planned
        try:
            _write_configuration(mesh, planned, run)
            daemon = _start_supervisor(planned, run)
            started = replace(planned, supervisor=Process.of(daemon.pid))
            state.write(run, started)
            _start_components(started, run, daemon, report)
        except BaseException:
            kill(run, started)
            raise
    return Running(run, started, daemon)


def prepare(mesh: MeshFile, home: Path, report: Report) -> None:
    """Makes the artefacts that are missing. One at a time: stacks share them."""
    began = time.monotonic()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "prepare.lock").open("w") as lock:
        report.doing("waiting for another stack that prepares artefacts")
        fcntl.flock(lock, fcntl.LOCK_EX)
        hooks.prepare(mesh.name, home, lambda what, share: report.doing(f"{mesh.name}: {what}, {share:.0%}"))
    report.done("artefacts", time.monotonic() - began)


def _plan(wanted: Wanted, mesh: MeshFile, run: RunFolder, ports: Ports) -> State:
    sockets = make_sockets_folder()
    try:
        topology = plan.addresses(mesh, sockets, ports, port=wanted.port, tcp=wanted.tcp)
        return State(
            stack=wanted.stack,
            mesh=mesh.name,
            mesh_file=str(wanted.mesh_file),
            home=str(wanted.home),
            started_us=state.now_us(),
            starter=Process.of(os.getpid()),
            sockets=str(sockets),
            control=str(sockets / "control.sock"),
            store=plan.store_url(sockets),
            topology=topology,
            components=plan.components(mesh, wanted.mesh_file, topology, run, sockets, wanted.home),
            detached=wanted.detach,
        )
    except BaseException:
        sockets.rmdir()
        raise


def _write_configuration(mesh: MeshFile, planned: State, run: RunFolder) -> None:
    from gateway import config, envoy

    try:
        run.envoy.write_text(json.dumps(config.bootstrap(mesh, planned.topology), indent=2))
        envoy.validate(run.envoy)
    except (config.ConfigError, envoy.EnvoyError) as error:
        raise StackError(f"the gateway cannot be configured: {error}") from error
    run.supervisor_conf.write_text(render(planned.components, run, Path(planned.control)))


def _start_supervisor(planned: State, run: RunFolder) -> subprocess.Popen[bytes]:
    """As a child in a session of its own: ^C in the terminal is for us, and we stop it in order."""
    command = [*python("deploy.local.supervise"), str(run.supervisor_conf), str(run.state), planned.sockets]
    environ = os.environ | common_environ() | {"TENFOLD_PARENT": str(os.getpid())}
    if not planned.detached:
        return subprocess.Popen(plan.tied(command), env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
    with run.log_of("supervisor-said").open("ab") as said:
        return subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )


def _start_components(started: State, run: RunFolder, daemon: subprocess.Popen[bytes], report: Report) -> None:
    report.doing("starting the supervisor")
    with Supervisor(started.control) as supervisor:
        supervisor.wait_until_there(lambda: daemon.poll() is None)
        for stage, members in groupby(started.components, key=lambda component: component.stage):
            if stage == plan.LEAVES:
                _fill(started, report)
            _start_stage(list(members), supervisor, run, report)
    _wait_until_seen(started, report)


def _start_stage(members: list[Component], supervisor: Supervisor, run: RunFolder, report: Report) -> None:
    began = time.monotonic()
    for component in members:
        supervisor.start(component)
    waiting = {component.name: component for component in members}
    looked = began
    while waiting:
        for component in list(waiting.values()):
            why = health.complaint(component)
            now = time.monotonic()
            if not why:
                del waiting[component.name]
                report.done(component.name, now - began)
                continue
            report.doing(f"waiting for {', '.join(waiting)}: {why}")
            if now - began > component.start_within_s:
                raise _failure(component, f"was not healthy within {component.start_within_s:.0f} s ({why})", run)
        if time.monotonic() - looked > LOOK_EVERY_S:
            looked = time.monotonic()
            _raise_if_one_fell(members, supervisor, run)
        if waiting:
            time.sleep(ASK_EVERY_S)


def _wait_until_seen(started: State, report: Report) -> None:
    """Until the gateway's own health checks have found every replica: before, it would ask fallback instead."""
    until = time.monotonic() + SEEN_WITHIN_S
    while missing := health.unseen(started.topology.admin):
        report.doing(f"waiting for the gateway to see {missing[0]}")
        if time.monotonic() > until:
            raise StackError(f"the gateway does not see {', '.join(missing)}")
        time.sleep(ASK_EVERY_S)


def _raise_if_one_fell(members: list[Component], supervisor: Supervisor, run: RunFolder) -> None:
    seen = supervisor.seen()
    for component in members:
        if seen[component.name].fell:
            raise _failure(component, "ended while it was starting", run)


def _failure(component: Component, what: str, run: RunFolder) -> StackError:
    log = run.log_of(component.name)
    lines = last_lines(log, LINES_OF_A_FAILURE) or ["(it said nothing)"]
    return StackError(
        "\n".join([f"{component.name} {what}; the end of {log}:", *(f"  {readable(line)}" for line in lines)])
    )


def _fill(started: State, report: Report) -> None:
    began = time.monotonic()
    report.doing("looking into the feature store")
    hooks.fill(
        started.mesh, Path(started.home), started.store, lambda what, share: report.doing(f"{what}, {share:.0%}")
    )
    report.done("features", time.monotonic() - began)
