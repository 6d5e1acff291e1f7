"""tenfold traces: what was recorded, from the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from loadtest.traces.store import Span

ARRIVES_WITHIN_S = 3.0
"""Spans are sent in batches, so a trace is complete a moment after its request."""


def commands(file_of: Callable[[str], Path]) -> typer.Typer:
    """The command group. file_of: where the traces of a named stack are kept."""
    app = typer.Typer(help="What was recorded of sampled requests.", no_args_is_help=True)

    @app.command("list")
    def list_traces(
        stack: Annotated[str, typer.Option(help="The stack's name.")] = "default",
        limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
        json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    ) -> None:
        """The newest traces."""
        _list(file_of(stack), limit, json)

    @app.command("show")
    def show_trace(
        trace_id: Annotated[str, typer.Argument(help="An id or its beginning; the newest trace if left out.")] = "",
        stack: Annotated[str, typer.Option(help="The stack's name.")] = "default",
        json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    ) -> None:
        """One trace as a tree: who called whom, when and for how long."""
        _show(file_of(stack), trace_id.lower(), json)

    return app


def _list(file: Path, limit: int, as_json: bool) -> None:
    import datetime
    from dataclasses import asdict

    from loadtest.traces.store import TraceStore

    with _told(file), TraceStore(file) as store:
        found = store.newest(limit)
    if as_json:
        _print_json([asdict(summary) for summary in found])
        return
    from rich.table import Table

    table = Table("trace", "began", "took ms", "spans", "failed", "service", "name", box=None)
    for entry in found:
        began = datetime.datetime.fromtimestamp(entry.start_ns / 1e9).astimezone().strftime("%H:%M:%S.%f")[:-3]
        failed = f"[red]{entry.failed}[/red]" if entry.failed else "0"
        table.add_row(
            entry.trace, began, f"{entry.duration_ns / 1e6:.2f}", str(entry.spans), failed, entry.service, entry.name
        )
    _console().print(table)


def _show(file: Path, trace_id: str, as_json: bool) -> None:
    from dataclasses import asdict

    spans = find(file, trace_id)
    if not spans:
        raise _fail(f"no trace {trace_id or 'at all'} in {file}; only sampled requests are kept")
    if as_json:
        _print_json([asdict(span) for span in spans])
    else:
        print_tree(spans)


def find(file: Path, trace_id: str, within_s: float = ARRIVES_WITHIN_S) -> list[Span]:
    """The spans of a trace, of the newest one where `trace_id` is empty; waits for those that are still on their way.

    Ends the command with a clear line where the file is not there or unreadable, or the id is ambiguous.
    """
    from loadtest.traces.store import TraceStore

    until = time.monotonic() + within_s
    while True:
        with _told(file), TraceStore(file) as store:
            newest = trace_id or next((summary.trace for summary in store.newest(1)), "")
            spans = store.trace(newest) if newest else []
        if _is_old(spans) or time.monotonic() > until:
            return spans
        time.sleep(0.3)


def print_tree(spans: list[Span]) -> None:
    """To the terminal, failed spans in red."""
    from rich.table import Table
    from rich.text import Text

    from loadtest.traces import tree

    table = Table("span", "start ms", "took ms", "status", "", box=None, padding=(0, 2, 0, 0))
    for line in tree.lines(tree.build(spans)):
        head = Text.assemble((line.branch, "dim"), (line.service, "bold"), " ", line.name)
        style = "red" if line.failed else ""
        status, offset, took = Text(line.status, style), f"{line.offset_ms:.2f}", f"{line.duration_ms:.2f}"
        table.add_row(head, offset, took, status, Text(line.attributes, style))
    for column in table.columns[1:3]:
        column.justify = "right"
    console = _console()
    console.print(f"trace {spans[0].trace}", highlight=False)
    console.print(table)


def _console() -> Console:
    """Standard output; lines are not cut where nobody's window is that narrow."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=240)


def _is_old(spans: list[Span]) -> bool:
    """Whether its last end is so long ago that nothing more of it is on its way."""
    return bool(spans) and time.time_ns() - max(span.start_ns + span.duration_ns for span in spans) > 1.5e9


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Ends the command with a clear line where the file cannot tell what was asked."""
    import sqlite3

    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise _fail(str(error)) from None
    except sqlite3.Error as error:
        raise _fail(f"{file}: {error}") from None


def _fail(message: str) -> typer.Exit:
    typer.echo(f"tenfold: {message}", err=True)
    return typer.Exit(1)
