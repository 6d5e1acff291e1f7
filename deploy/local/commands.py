"""tenfold up, down, status, logs, prepare and validate: a mesh on this machine, from the command line.

Imports happen inside the commands: `tenfold --help` must not wait for gRPC.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from deploy.local.folders import DEFAULT_STACK, RunFolder, home

Stack = Annotated[str, typer.Option(help="The stack's name; stacks run side by side.", show_default=True)]
Mesh = Annotated[
    Path | None,
    typer.Option(help="The mesh file; ./tenfold.toml if it is there, else the flights demonstration.", dir_okay=False),
]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]

DEMONSTRATION = Path(__file__).parents[1] / "flights" / "tenfold.toml"


def add_to(app: typer.Typer) -> None:
    for command in (up, down, status, logs, predict, prepare, demo, validate):
        app.command()(command)


def mesh_file(chosen: Path | None) -> Path:
    """The mesh file that is meant, absolute."""
    here = Path("tenfold.toml")
    return (chosen or (here if here.exists() else DEMONSTRATION)).absolute()


def traces_of(stack: str) -> Path:
    """Where the traces of a stack are kept."""
    with told():
        return RunFolder.of(stack, home()).traces


@contextmanager
def told() -> Iterator[None]:
    """Ends the command with a clear line, exit status 1, where it fails for a reason that can be foreseen."""
    from deploy.local.state import StackError
    from services.mesh.meshfile import MeshFileError

    try:
        yield
    except (StackError, MeshFileError, ValueError) as error:
        typer.echo(f"tenfold: {error}", err=True)
        raise typer.Exit(1) from None


def up(
    mesh: Mesh = None,
    stack: Stack = DEFAULT_STACK,
    port: Annotated[int | None, typer.Option(help="Of the gateway; the first free one from 8080 if left out.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running in the background.")] = False,
    tcp: Annotated[bool, typer.Option("--tcp", help="Services on loopback ports rather than Unix sockets.")] = False,
) -> None:
    """Start the mesh and keep it running until ^C.

    What dies is started again.
    """
    from deploy.local import terminal
    from deploy.local.up import Wanted

    with told():
        status = terminal.up(Wanted(mesh_file(mesh), stack, home(), port, tcp=tcp, detach=detach))
    raise typer.Exit(status)


def down(
    stack: Stack = DEFAULT_STACK,
    now: Annotated[bool, typer.Option("--now", help="Without waiting for calls in flight.")] = False,
) -> None:
    """Stop the mesh once calls in flight are answered."""
    from deploy.local import state
    from deploy.local.stop import kill, stop

    with told():
        run = RunFolder.of(stack, home())
        found = state.read(run)
        if found is None or not found.alive:
            state.clean_up(run)
            typer.echo(f"no stack {stack!r} is running")
            return
        (kill if now else stop)(run, found)
    typer.echo(f"stack {stack!r} is down")


def status(stack: Stack = DEFAULT_STACK, json: Json = False) -> None:
    """What runs, how well, and where it listens.

    Exit status 0 where everything serves, 3 where something does not, 1 where no stack runs.
    """
    from deploy.local import state, terminal
    from deploy.local.status import rows

    with told():
        found = state.running(RunFolder.of(stack, home()))
        processes = rows(found)
    if json:
        terminal.print_status_json(found, processes)
    else:
        terminal.print_status(found, processes)
    if not all(process.serving for process in processes):
        raise typer.Exit(3)


def logs(
    service: Annotated[str, typer.Argument(help="A service or one replica: router, router-0. All if left out.")] = "",
    stack: Stack = DEFAULT_STACK,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And what comes, until ^C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of each process to begin with.")] = 20,
    raw: Annotated[bool, typer.Option("--raw", help="As the processes wrote them.")] = False,
) -> None:
    """What the processes have said. Works for a stack that is down, too."""
    from deploy.local import terminal

    with told():
        terminal.print_logs(RunFolder.of(stack, home()), service, follow=follow, lines=lines, raw=raw)


def predict(
    flight: Annotated[str, typer.Option(help="A flight of the demonstration, as travellers know it: UA1216.")],
    priority: Annotated[str, typer.Option(help="critical, standard or background.")] = "critical",
    timeout_ms: Annotated[float, typer.Option(min=1, help="Within which an answer is worth something.")] = 1000,
    stack: Stack = DEFAULT_STACK,
    json: Json = False,
) -> None:
    """Ask the mesh: will the next departure of this flight be late?

    Exit status 0 for an answer, also a degraded one; 1 where there was none; 2 where the question makes no sense.
    """
    from deploy.local import state
    from deploy.local.predict import run
    from services.resilience.call import Priority

    labels = [known.label for known in Priority]
    if priority not in labels:
        raise typer.BadParameter(f"must be one of {', '.join(labels)}, got {priority!r}", param_hint="--priority")
    if not math.isfinite(timeout_ms):
        raise typer.BadParameter(f"must be finite, got {timeout_ms}", param_hint="--timeout-ms")
    with told():
        found = state.running(RunFolder.of(stack, home()))
        run(found, flight, Priority.parse(priority), timeout_ms, json_wanted=json)


def demo(keep: Annotated[bool, typer.Option("--keep", help="Leave the mesh running at the end.")] = False) -> None:
    """Predict 500 flights, lose a service, keep answering."""
    from deploy.flights import demo

    with told():
        status = demo.run(home(), keep=keep)
    raise typer.Exit(status)


def prepare(mesh: Mesh = None) -> None:
    """Make the artefacts that a mesh needs, as `up` does.

    Those that are there already are kept.
    """
    from deploy.local import terminal
    from deploy.local.up import prepare as prepare_artefacts
    from services.mesh import meshfile

    with told(), terminal.Progress() as progress:
        prepare_artefacts(meshfile.load(mesh_file(mesh)), home(), progress)


def validate(file: Annotated[Path, typer.Argument(help="A mesh file.", dir_okay=False)]) -> None:
    """Check a mesh file, and that the gateway accepts it."""
    from deploy.local.check import check

    with told():
        told_of = check(file.absolute())
    typer.echo(told_of)
    sys.stdout.flush()
