"""How the commands speak: tables for people, JSON for machines, progress beside both."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

_SAY_EVERY_S = 5.0  # where nobody sees a bar move


def print_json(value: object) -> None:
    """One object. Numbers that JSON has no words for are the texts "NaN", "Infinity" and "-Infinity"."""
    typer.echo(json.dumps(plain(value), allow_nan=False))


def plain(value: object) -> Any:
    """As JSON has it: dataclasses are objects, tuples are lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value


def console() -> Console:
    """Standard output; lines are not cut where nobody's window is that narrow."""
    found = Console()
    return found if found.is_terminal else Console(width=240)


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> None:
    """right: columns of numbers. Text that is marked up is not taken for markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console().print(table, highlight=False)


def number(value: float | None, digits: int = 6) -> str:
    """A dash for None and NaN."""
    return "-" if value is None or value != value else f"{value:.{digits}g}"


def count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def size(value: int | None) -> str:
    """Bytes as people say them."""
    if value is None:
        return "-"
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def share(value: float) -> str:
    return "-" if value != value else f"{value:.1%}"


class Progress:
    """What is being done, how fast and for how much longer, on standard error: a bar on a terminal, elsewhere a line
    every few seconds. A context manager.
    """

    def __init__(self, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        """unit: what is counted, "rows"."""
        self._unit, self._clock = unit, clock
        self._console = Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("", total=None, told="")
        self._what, self._began, self._before, self._said = "", clock(), 0, clock()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def of(self, what: str) -> Callable[[int, int], None]:
        """Takes how many of how many are done."""
        return lambda done, total: self.counted(what, done, total)

    def counted(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, f"{done:,} of {total:,} {self._unit}")

    def doing(self, what: str, done: float) -> None:
        """done: the share of all, 0 to 1."""
        self._show(what, round(done * 1000), 1000, f"{done:.0%}", is_counted=False)

    def _show(self, what: str, done: int, total: int, told: str, *, is_counted: bool = True) -> None:
        now = self._clock()
        if (what != self._what and is_counted) or not self._what:
            # what an earlier run had done says nothing of how fast this one is
            self._what, self._began, self._before = what, now, done
            self._bars.reset(self._task, description=escape(what), total=total, completed=done, told="")
        rate = (done - self._before) / (now - self._began) if now > self._began else 0.0
        if is_counted and rate > 0:
            told += f", {rate:,.0f}/s"
        self._bars.update(self._task, description=escape(what), completed=done, total=total, told=told)
        if self._bars.disable and (now - self._said >= _SAY_EVERY_S):
            self._said = now
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
            self._console.print(f"{escape(what)}: {told}{left}", highlight=False)
