"""What `tenfold features check` does and says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import typer

from services.feature.check import checks
from services.feature.check.checks import Checked
from services.feature.check.skew import ColumnSkew
from services.feature.commands import openmetrics, operations, screen
from services.feature.define.definitions import Definitions
from services.feature.offline.store import OfflineStore

OK, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What to check; None or empty for not that."""

    day: date | None
    views: Sequence[str]
    training_set: str
    served: Path | None


def check(offline: OfflineStore, definitions: Definitions, asked: Asked, metrics: Path | None, *, json: bool) -> int:
    """The exit status: 1 where anything mismatches, or nothing was compared."""
    found: list[Checked] = []
    with screen.Progress("rows") as progress:
        if asked.day:
            views, requested = operations.chosen_request_views(definitions, asked.views)
            found += checks.day(offline, views, asked.day, requested, progress=progress.doing)
        if asked.training_set:
            found.append(checks.training(offline, definitions, asked.training_set, progress=progress.doing))
        if asked.served:
            progress.doing("served", 0.0)
            found.append(checks.served(offline, definitions, asked.served))
    if metrics:
        openmetrics.write(metrics, found)
    agrees = all(one.agrees for one in found)
    if json:
        screen.print_json({"agrees": agrees, "checks": checks.as_plain(found)})
    else:
        for one in found:
            _print_checked(one)
    return OK if agrees else FAILED


def _print_checked(one: Checked) -> None:
    wrong = [skew for skew in one.columns if skew.mismatched]
    verdict = f"{len(wrong)} of them differ" if wrong else "all agree"
    told = (
        f"{len(one.columns)} features over up to {one.rows:,} rows each; {verdict}"
        if one.rows
        else "nothing was compared"
    )
    typer.echo(f"{one.path}: {told}")
    for note in dict.fromkeys(one.notes):
        typer.echo(f"  {note}")
    if wrong:
        head = ("  feature", "rows", "differ", "worst", "null", "should be", "p50", "should be", "shift")
        screen.print_table(head, [_skewed(skew) for skew in sorted(wrong, key=lambda s: -s.share)], right=head[1:])


def _skewed(skew: ColumnSkew) -> Sequence[object]:
    middle = screen.number(skew.quantiles_given[1], 4), screen.number(skew.quantiles_expected[1], 4)
    nulls = screen.share(skew.null_given), screen.share(skew.null_expected)
    worst = "null" if skew.worst == float("inf") else f"{skew.worst:.2g}"
    name = f"  {skew.view}.{skew.column}"
    return name, screen.count(skew.rows), screen.share(skew.share), worst, *nulls, *middle, f"{skew.shift:.3f}"
