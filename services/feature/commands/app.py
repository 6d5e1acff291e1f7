"""tenfold features: definitions, history and the online store, from the command line.

Exit status 0 where all is well, 1 where something failed or does not agree, 2 where definitions or the question itself
make no sense. Imports happen inside the commands: `tenfold --help` must not wait for numpy.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from services.feature.commands.place import Place

if TYPE_CHECKING:
    from datetime import date

    from services.feature.commands.reach import Reached
    from services.feature.define.definitions import Definitions
    from services.feature.offline.store import OfflineStore

T = TypeVar("T")
PlaceOf = Callable[[Path | None, str], Place]
"""Of a mesh file, None for the usual one, and a stack's name."""

Mesh = Annotated[
    Path | None, typer.Option(help="The mesh file; that of the running stack if left out.", dir_okay=False)
]
Stack = Annotated[str, typer.Option(help="The stack's name.")]
Definitions_ = Annotated[
    str, typer.Option("--definitions", help="A module with VIEWS, or a .py file; else the mesh's.")
]
Offline = Annotated[str, typer.Option(help="The folder or URL of events; else the mesh's.")]
Store = Annotated[str, typer.Option(help="The URL of the online store; else the running stack's.")]
Views = Annotated[list[str] | None, typer.Option("--view", help="Only this view; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Plot = Annotated[bool, typer.Option("--plot", help="Pictures too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Make everything again, also what is whole.")]
At = Annotated[str, typer.Option(help="The moment: ISO 8601 or microseconds since 1970; now if left out.")]
DEFAULT_STACK = "default"
_INTERRUPTED_QUERY = "Query interrupted"  # what DuckDB makes of Ctrl-C: a RuntimeError that says this
_HELP = """Features: define, compute, store, look, check.

Exit status: 0 where all is well; 1 where something failed, or does not agree; 2 where definitions or the question make
no sense; 130 where it was interrupted: what is whole stays, and the same command goes on.
"""


class NoStore(Exception):
    """There is no online store to work with; the message says why."""


class Nonsense(ValueError):
    """The question makes no sense; the message says why."""


def commands(place_of: PlaceOf) -> typer.Typer:
    """The command group."""
    app = typer.Typer(help=_HELP, no_args_is_help=True)

    @app.command("validate")
    def validate(
        definitions: Definitions_ = "",
        offline: Offline = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """Check definitions, and that the files of their sources have the columns they speak of."""
        from services.feature.commands import answers

        with _told():
            place = _place(place_of(mesh, stack), definitions, offline)
            status = answers.validate(_definitions(place), place, json=json)
        raise typer.Exit(status)

    @app.command("plan")
    def plan(
        view: Views = None,
        at: At = "",
        definitions: Definitions_ = "",
        offline: Offline = "",
        store: Store = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """What is defined against what is published, and what `materialize` would do. Writes nothing."""
        from services.feature.commands import answers, operations

        with _told():
            place = _place(place_of(mesh, stack), definitions, offline, store)
            defined, events, moment_us = _definitions(place), _events(place), _moment(at)
            views = operations.chosen(defined, view or [])
            _run(place, lambda it: answers.plan(it, events, defined, views, moment_us, json=json))

    @app.command("materialize")
    def materialize(
        view: Views = None,
        at: At = "",
        dry_run: DryRun = False,
        grace: Annotated[float, typer.Option(min=0, help="Seconds that readers get to leave the rows before.")] = 30.0,
        retire: Annotated[bool, typer.Option(help="Remove the rows before, after that grace.")] = True,
        definitions: Definitions_ = "",
        offline: Offline = "",
        store: Store = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """Load the rows of every entity into the online store, read some back, and let readers turn to them."""
        from services.feature.commands import answers, operations

        with _told():
            place = _place(place_of(mesh, stack), definitions, offline, store)
            defined, events, moment_us = _definitions(place), _events(place), _moment(at)
            views = operations.chosen(defined, view or [])
            if dry_run:
                _run(place, lambda it: answers.plan(it, events, defined, views, moment_us, json=json))
                return
            grace_s = grace if retire else None
            _run(
                place,
                lambda it: answers.materialize(it, events, views, moment_us, grace_s=grace_s, json=json),
            )

    @app.command("backfill")
    def backfill(
        view: Annotated[str, typer.Argument(help="The view.")],
        first: Annotated[str, typer.Option("--from", help="The first day, YYYY-MM-DD.")],
        last: Annotated[str, typer.Option("--to", help="The last day, included.")],
        out: Annotated[str, typer.Option(help="The folder or URL that the rows are written to.")],
        buckets: Annotated[
            int, typer.Option(min=1, max=4096, help="Parts that each day's entities are cut into.")
        ] = 16,
        restart: Restart = False,
        dry_run: DryRun = False,
        definitions: Definitions_ = "",
        offline: Offline = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """Write a view's rows at the end of every day. What was cut off goes on where it stopped."""
        from services.feature.commands import answers
        from services.feature.offline.backfill import Days

        with _told():
            place = _place(place_of(mesh, stack), definitions, offline)
            defined = _definitions(place)
            first_day, last_day = _day("--from", first), _day("--to", last)
            with _sense("--to"):
                days = Days(first_day, last_day)
            answers.backfill(
                _events(place), defined.view(view), days, out, buckets=buckets, restart=restart, dry=dry_run, json=json
            )

    @app.command("training-set")
    def training_set(
        labels: Annotated[str, typer.Option(help="Parquet or CSV: a file, a folder or a URL.")],
        time: Annotated[str, typer.Option(help="The column of moments.")],
        out: Annotated[str, typer.Option(help="The folder or URL that the training set is written to.")],
        entity: Annotated[list[str] | None, typer.Option(help="entity=column, where names differ; repeatable.")] = None,
        view: Views = None,
        clock: Annotated[str, typer.Option(help="known; or event, to see what a leak promises.")] = "known",
        restart: Restart = False,
        dry_run: DryRun = False,
        definitions: Definitions_ = "",
        offline: Offline = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """Join labels with the features as they were known at each label's moment."""
        from services.feature.commands import answers, operations
        from services.feature.offline.store import Clock
        from services.feature.offline.training import Labels, Wanted

        with _told():
            if clock not in list(Clock):
                raise Nonsense(f"--clock must be one of {', '.join(Clock)}, got {clock!r}")
            place = _place(place_of(mesh, stack), definitions, offline)
            stored, requested = operations.chosen_request_views(_definitions(place), view or [])
            wanted = Wanted(stored, requested, Clock(clock))
            given = Labels(labels, time, dict(map(_pair, entity or [])))
            answers.training_set(_events(place), given, wanted, out, restart=restart, dry=dry_run, json=json)

    @app.command("show")
    def show(
        entity_id: Annotated[str, typer.Argument(metavar="ENTITY", help="The id: JFK, N14228.")],
        view: Views = None,
        definitions: Definitions_ = "",
        store: Store = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """What the online store has for an entity: every value, and whether a reader would get it now."""
        from services.feature.commands import answers

        with _told():
            place = _place(place_of(mesh, stack), definitions, "", store)
            defined = _definitions(place, needed=False)
            _run(place, lambda it: answers.show(it, defined, view or [], entity_id, json=json))

    @app.command("check")
    def check(
        day: Annotated[str, typer.Option(help="Replay this day, YYYY-MM-DD, by batch, stream and request.")] = "",
        training_set: Annotated[str, typer.Option(help="The folder of a training set.")] = "",
        served: Annotated[
            Path | None, typer.Option(help="The folder of served samples.", file_okay=False, exists=True)
        ] = None,
        view: Views = None,
        metrics: Annotated[Path | None, typer.Option(help="Write OpenMetrics here, too.", dir_okay=False)] = None,
        definitions: Definitions_ = "",
        offline: Offline = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """Whether what was served, trained on or streamed is what the events say. Exit status 1 where it is not."""
        from services.feature.commands import checking

        with _told():
            if not (day or training_set or served):
                raise Nonsense("say what to check: --day, --training-set or --served")
            if view and not day:
                raise Nonsense("--view goes with --day")
            place = _place(place_of(mesh, stack), definitions, offline)
            asked = checking.Asked(_day("--day", day) if day else None, view or [], training_set, served)
            status = checking.check(_events(place), _definitions(place), asked, metrics, json=json)
        raise typer.Exit(status)

    @app.command("stats")
    def stats(
        view: Views = None,
        column: Annotated[list[str] | None, typer.Option(help="Only this column; may be repeated.")] = None,
        rows: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rows of each view to look at.")] = 1_000,
        plot: Plot = False,
        definitions: Definitions_ = "",
        store: Store = "",
        mesh: Mesh = None,
        stack: Stack = DEFAULT_STACK,
        json: Json = False,
    ) -> None:
        """How much the online store holds of each view, how fresh it is, and how its values are distributed."""
        from services.feature.commands import answers

        with _told():
            if plot and json:
                raise Nonsense("--plot is for people and --json for machines; give one of them")
            place = _place(place_of(mesh, stack), definitions, "", store)
            defined = _definitions(place, needed=False)
            _run(
                place,
                lambda it: answers.stats(it, defined, view or [], column or [], rows, plot=plot, json=json),
            )

    return app


def _place(found: Place, definitions: str = "", offline: str = "", store: str = "") -> Place:
    """With what the command line says instead."""
    return dataclasses.replace(
        found,
        definitions=definitions or found.definitions,
        offline=offline or found.offline,
        store=store or found.store,
    )


def _definitions(place: Place, *, needed: bool = True) -> Definitions:
    from services.feature.define.definitions import Definitions, load

    if place.definitions:
        return load(place.definitions)
    if needed:
        raise Nonsense(f"mesh {place.mesh!r} names no definitions: [features] definitions, or --definitions")
    return Definitions(())


def _events(place: Place) -> OfflineStore:
    from services.feature.offline.store import OfflineStore

    return OfflineStore(place.offline)


def _run(place: Place, use: Callable[[Reached], Awaitable[T]]) -> T:
    """With the online store."""
    from services.feature.commands.reach import reach

    if not place.store:
        raise NoStore(f"{place.why or 'no online store is running'}; name one with --store")

    async def within() -> T:
        async with reach(place.store, place.mesh) as reached:
            return await use(reached)

    return asyncio.run(within())


def _moment(text: str) -> int:
    from services.feature.commands.moments import moment_us, now_us

    with _sense("--at"):
        return moment_us(text) if text else now_us()


def _day(option: str, text: str) -> date:
    from services.feature.commands.moments import day

    with _sense(option):
        return day(text)


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise Nonsense(f"--entity must be entity=column, got {text!r}")
    return name, column


@contextmanager
def _sense(option: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise Nonsense(f"{option}: {error}") from None


@contextmanager
def _told() -> Iterator[None]:
    """Ends the command with one clear line where it fails for a reason that can be foreseen."""
    logging.getLogger("services").addHandler(logging.NullHandler())  # what it would warn of, that line says
    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted() from None
    except Exception as error:
        if str(error) == _INTERRUPTED_QUERY:
            raise _interrupted() from None
        status = _status_of(error)
        if not status:
            raise
        typer.echo(f"tenfold: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(status) from None


def _interrupted() -> typer.Exit:
    typer.echo("tenfold: interrupted; what is whole stays, and the same command goes on", err=True)
    return typer.Exit(130)


def _status_of(error: Exception) -> int:
    """2 for what was asked wrongly, 1 for what failed for a reason that can be foreseen, 0 for a mistake of ours."""
    from services.feature.define.definition import DefinitionError
    from services.feature.offline.parts import PartsError
    from services.feature.offline.store import OfflineError
    from services.feature.stream.applier import Gap
    from services.feature.stream.archive import ArchiveError
    from services.resilience.errors import CallError

    if isinstance(error, (DefinitionError, Nonsense)):
        return 2
    foreseen = (ArchiveError, CallError, Gap, NoStore, OfflineError, OSError, PartsError, ValueError)
    return 1 if isinstance(error, foreseen) else 0
