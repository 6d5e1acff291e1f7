"""What a person sees of a stack: progress, tables, logs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.local import logs
from deploy.local.folders import RunFolder, option
from deploy.local.state import StackError, State, clean_up
from deploy.local.status import Row, rows
from deploy.local.stop import kill, stop
from deploy.local.up import Running, Wanted, bring_up

OK, FAILED, INTERRUPTED = 0, 1, 130


class Progress:
    """A spinner on a terminal; elsewhere only what is done. A context manager, or once without."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("", spinner="dots")

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def doing(self, what: str) -> None:
        self._status.update(escape(what))

    def done(self, what: str, took_s: float) -> None:
        self._console.print(f"[green]✓[/green] {escape(what):<14} {took_s:6.1f} s", highlight=False)


class StopRequested(BaseException):
    """^C or SIGTERM."""


def up(wanted: Wanted) -> int:
    """Starts a stack and, unless detached, stays with it. Returns the exit status."""
    with _signals_raise():
        try:
            with Progress() as progress:
                running = bring_up(wanted, progress)
            _print_first_table(running)
        except StopRequested:
            sys.stderr.write("tenfold: interrupted; nothing is left running\n")
            return INTERRUPTED
        if wanted.detach:
            return OK
        return _stay(running)


def _print_first_table(running: Running) -> None:
    """Whoever interrupts it takes back the whole command: also a detached stack ends."""
    try:
        print_table(running.state, rows(running.state))
    except StopRequested:
        kill(running.run, running.state)
        raise


def _stay(running: Running) -> int:
    """Until told to stop, or the stack ends by itself. A second request to stop ends everything at once."""
    try:
        try:
            status = running.daemon.wait()
        except StopRequested:
            sys.stderr.write("\ntenfold: stopping; calls in flight are being answered (^C again to end at once)\n")
            stop(running.run, running.state)
            running.daemon.wait()
            return OK
    except StopRequested:
        kill(running.run, running.state)
        running.daemon.wait()
        sys.stderr.write("\ntenfold: ended at once\n")
        return INTERRUPTED
    if status == 0:
        sys.stderr.write(f"tenfold: stack {running.state.stack!r} was stopped\n")
        return OK
    clean_up(running.run)  # the processes end by themselves when their supervisor does
    sys.stderr.write(f"tenfold: the supervisor ended with status {status}, and the stack with it\n")
    return FAILED


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop_requested(_number: int, _frame: FrameType | None) -> None:
        raise StopRequested

    before = {number: signal.signal(number, stop_requested) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_table(state: State, processes: Sequence[Row]) -> None:
    """The table at the end of `tenfold up`."""
    print_status(state, processes)
    example = f"; try: tenfold predict --flight UA1216{option(state.stack)}" if state.mesh == "flights" else ""
    wide_console().print(f"call [bold]{state.topology.ingress}[/bold]{example}", highlight=False, soft_wrap=True)


def print_status(state: State, processes: Sequence[Row]) -> None:
    title = f"stack {state.stack!r}: mesh {state.mesh!r}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("component", "replica", "pid", "state", "up", "restarts", "memory", "address"):
        table.add_column(name, justify="right" if name in ("pid", "up", "restarts", "memory") else "left")
    for row in processes:
        style = "" if row.serving else "red"
        table.add_row(
            row.component,
            row.replica,
            str(row.pid or "-"),
            f"[{style or 'green'}]{escape(row.state)}",
            duration(row.uptime_s),
            str(row.restarts),
            f"{row.memory_mb:.0f} MB",
            row.address,
        )
    table.add_row(
        "", "", "", "", "", "", f"[bold]{sum(row.memory_mb for row in processes):.0f} MB", "", end_section=True
    )
    console = wide_console()
    console.print(table)
    console.print(f"gateway's own page: http://{state.topology.admin}", highlight=False)


def print_status_json(state: State, processes: Sequence[Row]) -> None:
    about = {
        "stack": state.stack,
        "mesh": state.mesh,
        "mesh_file": state.mesh_file,
        "ingress": state.topology.ingress,
        "egress": state.topology.egress,
        "admin": state.topology.admin,
        "otlp": state.topology.otlp,
        "store": state.store,
        "started_us": state.started_us,
        "detached": state.detached,
        "processes": [asdict(row) | {"serving": row.serving} for row in processes],
    }
    sys.stdout.write(json.dumps(about, indent=2) + "\n")


def print_logs(run: RunFolder, service: str, *, follow: bool, lines: int, raw: bool) -> None:
    """Raises StackError where no process of that name has ever said anything."""
    found = sorted(log for log in run.logs.glob("*.log") if service in ("", log.stem, log.stem.rpartition("-")[0]))
    if not found:
        there = ", ".join(sorted(log.stem for log in run.logs.glob("*.log"))) or "none"
        raise StackError(f"no logs of {service or 'any process'!r} in {run.logs}; there are: {there}")
    width = max(len(log.stem) for log in found)

    def say(name: str, line: str) -> None:
        sys.stdout.write(f"{name:<{width}}  {line if raw else logs.readable(line)}\n")

    try:
        tails = logs.follow(found) if follow else iter(())
        for log in found:
            for line in logs.last_lines(log, lines):
                say(log.stem, line)
        sys.stdout.flush()
        for log, line in tails:
            say(log.stem, line)
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        return


def wide_console() -> Console:
    """Standard output; lines are not cut where nobody's window is that narrow."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def duration(seconds: float) -> str:
    """In the largest unit that says enough: 42 s, 3 m 20 s, 2 h 5 m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} m"
