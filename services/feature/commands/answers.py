"""What each command does and says: the work is in operations.py and beside it, the words are here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from services.feature.commands import operations, plots, screen, sources
from services.feature.commands.entity import EntityRow
from services.feature.commands.moments import age, iso, now_us
from services.feature.commands.place import Place
from services.feature.commands.planning import Change, PlannedView
from services.feature.commands.reach import Reached
from services.feature.commands.stats import Looked
from services.feature.define.definition import View
from services.feature.define.definitions import Definitions
from services.feature.offline.backfill import Days
from services.feature.offline.backfill import backfill as backfill_view
from services.feature.offline.parts import Parts
from services.feature.offline.store import OfflineStore

if TYPE_CHECKING:
    from services.feature.offline.training import Labels, Wanted

_MOST_PLOTS = 12
_WIDEST = 100  # columns of a terminal
_MOST_CHANGES = 4
_US_PER_S = 1_000_000
_STEPS = ((86_400 * _US_PER_S, "d"), (3_600 * _US_PER_S, "h"), (60 * _US_PER_S, "m"), (_US_PER_S, "s"))


def validate(definitions: Definitions, place: Place, *, json: bool) -> int:
    """The exit status: 1 where a file is not as the definitions have it."""
    views = operations.described(definitions)
    with screen.Progress("files") as progress:
        found, problems = sources.examine(
            place.offline,
            definitions.sources.values(),
            operations.streamed(definitions),
            progress.of("reading footers"),
        )
    if json:
        told = {"definitions": place.definitions, "offline": place.offline, "valid": not problems}
        screen.print_json({**told, "views": views, "sources": found, "problems": problems})
        return 1 if problems else 0
    rows = [
        (
            view.view,
            view.kind,
            view.entity or "-",
            len(view.columns),
            ", ".join(view.sources) or "-",
            ", ".join(_window(one) for one in view.windows) or "-",
            age(view.ttl_s) if view.ttl_s else "-",
        )
        for view in views
    ]
    head = ("view", "kind", "entity", "columns", "reads", "windows/steps", "ttl")
    screen.print_table(head, rows, right=("columns",))
    typer.echo("")
    files = [(one.source, screen.count(one.files), screen.count(one.rows), screen.size(one.bytes)) for one in found]
    screen.print_table(("source", "files", "rows", "stored"), files, right=("files", "rows", "stored"))
    typer.echo("")
    for problem in problems:
        typer.echo(f"tenfold: {problem}", err=True)
    typer.echo(f"{place.definitions}: {'wrong' if problems else 'valid'}")
    return 1 if problems else 0


def _window(one: operations.Windows) -> str:
    if not one.window:
        return "ever"
    if not one.step_us:
        return f"{one.window}/exact"
    return one.window + "/" + next(f"{one.step_us // us}{unit}" for us, unit in _STEPS if one.step_us % us == 0)


async def plan(
    reached: Reached, offline: OfflineStore, definitions: Definitions, views: Sequence[View], at_us: int, *, json: bool
) -> None:
    with screen.Progress("views") as progress:
        found = await operations.plan(reached, offline, definitions, views, at_us, now_us(), progress.doing)
    if json:
        screen.print_json({"mesh": reached.mesh, "at_us": at_us, "at": iso(at_us), "views": found})
        return
    head = ("view", "change", "kind", "generation", "rows", "entities", "bytes", "age")
    screen.print_table(head, [_planned(one) for one in found], right=("rows", "entities", "bytes"))
    for one in found:
        if one.change is Change.CHANGED and (told := _changed_columns(one)):
            typer.echo(f"{one.view}: {told}")


def _planned(one: PlannedView) -> Sequence[object]:
    generations = f"{one.generation or '-'} -> {one.next_generation or '-'}"
    sizes = screen.count(one.rows), screen.count(one.entities), screen.size(one.bytes)
    return one.view, one.change, one.kind, generations, *sizes, age(one.age_s)


def _changed_columns(one: PlannedView) -> str:
    changes = [f"+{name}" for name in one.added] + [f"-{name}" for name in one.removed]
    more = f" and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
    return ", ".join(changes[:_MOST_CHANGES]) + more


async def materialize(
    reached: Reached,
    offline: OfflineStore,
    views: Sequence[View],
    at_us: int,
    *,
    grace_s: float | None,
    json: bool,
) -> None:
    """grace_s: None for leaving the rows before to the next materialisation."""
    with screen.Progress("rows") as progress:
        found = await operations.materialize(reached, offline, views, at_us, grace_s, progress.counted, progress.doing)
    if json:
        screen.print_json({"mesh": reached.mesh, "at_us": at_us, "at": iso(at_us), "views": found})
        return
    rows = [
        (
            one.view,
            one.kind,
            f"{one.replaced or '-'} -> {one.generation}",
            screen.count(one.rows),
            f"{one.seconds:.1f}",
            screen.count(round(one.rows_per_s)),
            "overtaken by a later one" if one.overtaken else "published",
        )
        for one in found
    ]
    head = ("view", "kind", "generation", "rows", "seconds", "rows/s", "outcome")
    screen.print_table(head, rows, right=("rows", "seconds", "rows/s"))


def backfill(
    offline: OfflineStore,
    view: View,
    days: Days,
    out: str,
    *,
    buckets: int,
    restart: bool,
    dry: bool,
    json: bool,
) -> None:
    total = len(list(days)) * buckets
    told: dict[str, object] = {
        "view": view.name,
        "from": days.first.isoformat(),
        "to": days.last.isoformat(),
        "out": out,
    }
    if dry:
        _say_dry({**told, "parts": total, "buckets": buckets, "columns": list(view.columns)}, json=json)
        return
    with screen.Progress("parts") as progress:
        began = _Timer()
        parts = backfill_view(
            offline, view, days, out, buckets=buckets, restart=restart, progress=progress.of(view.name)
        )
    _say_parts(told, parts, began, json=json)


def training_set(
    offline: OfflineStore, labels: Labels, wanted: Wanted, out: str, *, restart: bool, dry: bool, json: bool
) -> None:
    views = [*(view.name for view in wanted.views), *(view.name for view in wanted.request_views)]
    told: dict[str, object] = {
        "labels": labels.path,
        "time": labels.time,
        "clock": wanted.clock.value,
        "views": views,
        "out": out,
    }
    # reads any file that Arrow knows, and takes its time to load
    from services.feature.offline.training import examined
    from services.feature.offline.training import training_set as join_labels

    if dry:
        _say_dry({**told, "rows": examined(labels, wanted), "columns": list(wanted.columns)}, json=json)
        return
    with screen.Progress("rows") as progress:
        began = _Timer()
        known: dict[str, tuple[int, int]] = {}

        def count(view: str, some: int, rows: int) -> None:
            before = known.get(view, (0, 0))
            known[view] = before[0] + some, before[1] + rows

        parts = join_labels(offline, labels, wanted, out, restart=restart, progress=progress.of("joining"), known=count)
    shares = {view: some / rows for view, (some, rows) in known.items()}
    _say_parts({**told, "columns": len(wanted.columns), "known": shares}, parts, began, json=json)
    if not json and shares:
        entities = {view.name: view.entity for view in wanted.views}
        typer.echo("known by then: " + ", ".join(f"{view} {screen.share(one)}" for view, one in shares.items()))
        for view in (view for view, one in shares.items() if not one):
            typer.echo(
                f"tenfold: view {view!r}: nothing was known of any {entities[view]}: are ids and moments right?",
                err=True,
            )


class _Timer:
    def __init__(self) -> None:
        self._began_us = now_us()

    @property
    def seconds(self) -> float:
        return (now_us() - self._began_us) / _US_PER_S


def _say_dry(told: dict[str, object], *, json: bool) -> None:
    if json:
        screen.print_json({**told, "dry_run": True})
        return
    for name, value in told.items():
        shown = f"{len(value)}: {', '.join(map(str, value))}" if isinstance(value, list) else value
        text = f"{name:<8} {shown}"
        typer.echo(textwrap.fill(text, _WIDEST, subsequent_indent=" " * 9, break_on_hyphens=False))
    typer.echo("nothing was written")


def _say_parts(told: dict[str, object], parts: Parts, began: _Timer, *, json: bool) -> None:
    seconds, rows = began.seconds, sum(parts.rows.values())
    if json:
        screen.print_json({**told, "parts": len(parts.rows), "rows": rows, "seconds": seconds})
        return
    typer.echo(
        f"{parts.folder}: {rows:,} rows in {len(parts.rows):,} part{'s' * (len(parts.rows) != 1)}, {seconds:.1f} s"
    )


async def show(reached: Reached, definitions: Definitions, names: Sequence[str], entity_id: str, *, json: bool) -> None:
    now = now_us()
    found = await operations.show(reached, definitions, names, entity_id, now)
    if json:
        screen.print_json({"mesh": reached.mesh, "entity_id": entity_id, "now_us": now, "views": found})
        return
    for row in found:
        if row.found or names or row.note:
            _print_row(row)
    missing = [row.view for row in found if not row.found and not row.note]
    if missing and not names:
        typer.echo(f"nothing of {entity_id!r} in: {', '.join(missing)}")


def _print_row(row: EntityRow) -> None:
    typer.echo(f"{row.view} ({row.entity}, {row.kind}), generation {row.generation}")
    watermark = iso(row.watermark_us) or "none"
    if row.found:
        kept = f", expires at {age(row.ttl_s)}" if row.ttl_s else ""
        typer.echo(f"  counted up to {iso(row.event_us)}, {age(row.age_s)} ago{kept}")
    else:
        typer.echo("  no row")
    typer.echo(f"  watermark of the view {watermark}")
    if row.note:
        typer.echo(f"  {row.note}")
    if row.found:
        cells = [(cell.column, screen.number(cell.value), cell.status) for cell in row.cells]
        screen.print_table(("  column", "value", "status"), [(f"  {n}", v, s) for n, v, s in cells], right=("value",))
    typer.echo("")


async def stats(
    reached: Reached,
    definitions: Definitions,
    names: Sequence[str],
    columns: Sequence[str],
    rows: int,
    *,
    plot: bool,
    json: bool,
) -> None:
    """columns: of which views, if any are named."""
    found = await operations.stats(reached, definitions, names, rows, now_us())
    there = {column for one in found for column in one.values}
    if missing := [column for column in columns if column not in there]:
        raise ValueError(f"--column: no view that was looked at has {missing[0]!r}")
    if json:
        screen.print_json({"mesh": reached.mesh, "views": [one.stats for one in found]})
        return
    _print_views(found)
    if names or columns:
        _print_columns(found, columns)
    if plot:
        _print_plots(found, columns, wanted=bool(names or columns))


def _print_views(found: Sequence[Looked]) -> None:
    head = ("view", "kind", "generation", "rows", "bytes", "age", "row age p50", "expired", "sampled")
    rows = [
        (
            s.view,
            s.kind,
            s.generation or "-",
            screen.count(s.rows),
            screen.size(s.bytes),
            age(s.age_s),
            age(s.row_age_s[1]),
            screen.share(s.expired),
            screen.count(s.sampled),
        )
        for s in (one.stats for one in found)
    ]
    screen.print_table(head, rows, right=("rows", "bytes", "expired", "sampled"))
    for one in found:
        if one.stats.note:
            typer.echo(one.stats.note)


def _print_columns(found: Sequence[Looked], columns: Sequence[str]) -> None:
    typer.echo("")
    rows = [
        (f"{one.stats.view}.{c.column}", screen.share(c.null), *map(screen.number, (c.p10, c.p50, c.p90)))
        for one in found
        for c in one.stats.columns
        if not columns or c.column in columns
    ]
    screen.print_table(("feature", "null", "p10", "p50", "p90"), rows, right=("null", "p10", "p50", "p90"))


def _print_plots(found: Sequence[Looked], columns: Sequence[str], *, wanted: bool) -> None:
    """Freshness of all views; distributions of what was asked for by name."""
    colour = screen.console().is_terminal
    typer.echo("")
    typer.echo(plots.freshness({one.stats.view: one.stats.age_s for one in found}, colour=colour))
    pictures = [
        (f"{one.stats.view}.{column}", values)
        for one in found
        for column, values in one.values.items()
        if wanted and (not columns or column in columns)
    ]
    for title, values in pictures[:_MOST_PLOTS]:
        typer.echo(plots.distribution(title, values, colour=colour))
    if len(pictures) > _MOST_PLOTS:
        typer.echo(f"and {len(pictures) - _MOST_PLOTS} more columns; choose with --column")
