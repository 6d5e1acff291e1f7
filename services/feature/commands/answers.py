"""What each command does and says: the work is in operations.py and beside it, the words are here."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import typer

from services.feature.check import checks
from services.feature.check.checks import Checked
from services.feature.check.skew import ColumnSkew
from services.feature.commands import openmetrics, operations, plots, screen, sources
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
from services.feature.offline.training import Labels, Wanted, examined
from services.feature.offline.training import training_set as join_labels

OK, FAILED = 0, 1
_MOST_PLOTS = 12
_MOST_CHANGES = 4
_US_PER_S = 1_000_000
_STEPS = ((86_400 * _US_PER_S, "d"), (3_600 * _US_PER_S, "h"), (60 * _US_PER_S, "m"), (_US_PER_S, "s"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What to check; None or empty for not that."""

    day: date | None
    views: Sequence[str]
    training_set: str
    served: Path | None


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
        return FAILED if problems else OK
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
    return FAILED if problems else OK


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
    head = ("view", "change", "kind", "generation", "rows", "entities", "bytes", "counted up to", "age", "columns")
    screen.print_table(head, [_planned(one) for one in found], right=("rows", "entities", "bytes"))


def _planned(one: PlannedView) -> Sequence[object]:
    generations = f"{one.generation or '-'} -> {one.next_generation or '-'}"
    changes = [f"+{name}" for name in one.added] + [f"-{name}" for name in one.removed]
    told = f"{len(changes)}" if one.change in (Change.NEW, Change.UNDEFINED) else ", ".join(changes[:_MOST_CHANGES])
    if one.change is Change.CHANGED and len(changes) > _MOST_CHANGES:
        told += f" and {len(changes) - _MOST_CHANGES} more"
    sizes = screen.count(one.rows), screen.count(one.entities), screen.size(one.bytes)
    return one.view, one.change, one.kind, generations, *sizes, iso(one.watermark_us) or "-", age(one.age_s), told


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
    head = ("view", "kind", "generation", "rows", "seconds", "rows/s", "")
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
    if dry:
        _say_dry({**told, "rows": examined(labels, wanted), "columns": list(wanted.columns)}, json=json)
        return
    with screen.Progress("rows") as progress:
        began = _Timer()
        parts = join_labels(offline, labels, wanted, out, restart=restart, progress=progress.of("joining"))
    _say_parts({**told, "columns": len(wanted.columns)}, parts, began, json=json)


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
        typer.echo(f"{name:<8} {shown}")
    typer.echo("nothing was written")


def _say_parts(told: dict[str, object], parts: Parts, began: _Timer, *, json: bool) -> None:
    seconds, rows = began.seconds, sum(parts.rows.values())
    if json:
        screen.print_json({**told, "parts": len(parts.rows), "rows": rows, "seconds": seconds})
        return
    typer.echo(f"{parts.folder}: rows {rows:,}, parts {len(parts.rows):,}, {seconds:.1f} s")


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
    until = f"counted up to {iso(row.event_us)}, {age(row.age_s)} ago" if row.found else "no row"
    where = f"generation {row.generation}, watermark {iso(row.watermark_us) or 'none'}"
    kept = f", expires at {age(row.ttl_s)}" if row.ttl_s else ""
    typer.echo(f"{row.view} ({row.entity}, {row.kind}): {until}{kept}; {where}")
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
    head = ("view", "kind", "generation", "rows", "bytes", "counted up to", "age", "row age p50", "expired", "sampled")
    rows = [
        (
            s.view,
            s.kind,
            s.generation or "-",
            screen.count(s.rows),
            screen.size(s.bytes),
            iso(s.watermark_us) or "-",
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


def check(offline: OfflineStore, definitions: Definitions, asked: Asked, metrics: Path | None, *, json: bool) -> int:
    """The exit status: 1 where anything mismatches."""
    found: list[Checked] = []
    with screen.Progress("rows") as progress:
        if asked.day:
            views = operations.chosen(definitions, asked.views)
            found += checks.day(offline, views, asked.day, progress=progress.doing)
        if asked.training_set:
            progress.doing("training set", 0.0)
            found.append(checks.training(offline, definitions, asked.training_set))
        if asked.served:
            progress.doing("served", 0.0)
            found.append(checks.served(offline, definitions, asked.served))
    if metrics:
        openmetrics.write(metrics, found)
    agrees = all(one.agrees for one in found)
    if json:
        screen.print_json({"agrees": agrees, "checks": json_text.loads(checks.as_json(found))})
    else:
        for one in found:
            _print_checked(one)
    return OK if agrees else FAILED


def _print_checked(one: Checked) -> None:
    wrong = [skew for skew in one.columns if skew.mismatched]
    rows = max((skew.rows for skew in one.columns), default=0)
    verdict = f"{len(wrong)} of them differ" if wrong else "all agree"
    told = f"{len(one.columns)} features over up to {rows:,} rows each; {verdict}" if rows else "nothing was compared"
    typer.echo(f"{one.path}: {told}")
    for note in dict.fromkeys(one.notes):
        typer.echo(f"  {note}")
    if wrong:
        head = (
            "  feature",
            "rows",
            "differ",
            "worst",
            "null given",
            "null expected",
            "p50 given",
            "p50 expected",
            "shift",
        )
        screen.print_table(head, [_skewed(skew) for skew in sorted(wrong, key=lambda s: -s.share)], right=head[1:])


def _skewed(skew: ColumnSkew) -> Sequence[object]:
    middle = screen.number(skew.quantiles_given[1]), screen.number(skew.quantiles_expected[1])
    nulls = screen.share(skew.null_given), screen.share(skew.null_expected)
    worst = "null" if skew.worst == float("inf") else f"{skew.worst:.2g}"
    name = f"  {skew.view}.{skew.column}"
    return name, screen.count(skew.rows), screen.share(skew.share), worst, *nulls, *middle, f"{skew.shift:.3f}"
