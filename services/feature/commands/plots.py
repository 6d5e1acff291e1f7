"""Distributions and freshness as pictures in a terminal."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEIGHT = 12
_WIDEST = 100
_BINS = 30
_ENOUGH = 100  # values that have a 1st and a 99th percentile worth the name
_UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def freshness(ages_s: Mapping[str, float], *, colour: bool) -> str:
    """Views, and how old what was counted last is. Ages that are no numbers are left out."""
    ages = {view: age for view, age in ages_s.items() if age == age}
    if not ages:
        return ""
    most = max(map(abs, ages.values()))
    size, unit = next(((size, unit) for size, unit in _UNITS if most >= size), _UNITS[-1])
    names, lengths = list(reversed(ages)), [age / size for age in reversed(ages.values())]

    def bars(figure: Any) -> Any:
        return figure.bar(names, lengths, orientation="h", width=0.5)

    limits = min(0.0, *lengths), max(0.0, *lengths)
    return _drawn(f"age of what was counted last, {unit}", bars, 4 + 2 * len(ages), colour=colour, limits=limits)


def distribution(title: str, values: NDArray[np.floating], *, colour: bool) -> str:
    """How many rows have which value; between the 1st and the 99th percentile, so that a few outliers hide nothing."""
    if not len(values):
        return f"{title}: no values"
    low, high = np.quantile(values, (0.01, 0.99)) if len(values) >= _ENOUGH else (values.min(), values.max())
    if low == high:
        return f"{title}: {float((values == low).mean()):.0%} of {len(values)} are {float(low):g}"
    kept: Sequence[float] = values[(values >= low) & (values <= high)].astype(np.float64).tolist()
    told = f"{title}, {len(kept)} of {len(values)} values"
    return _drawn(told, lambda figure: figure.hist(kept, bins=_BINS), _HEIGHT, colour=colour)


def _drawn(
    title: str,
    signal_of: Callable[[Any], Any],
    height: int,
    *,
    colour: bool,
    limits: tuple[float, float] | None = None,
) -> str:
    """limits: of the values on the horizontal axis."""
    # typed as anything: the library has no types, and its one figure belongs to the process
    plotext: Any = importlib.import_module("plotext")
    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if colour else "colorless")
    figure.plot_size(min(_WIDEST, shutil.get_terminal_size().columns), height)
    figure.title(title)
    figure.draw(signal_of(figure))
    if limits:
        figure.ruler("x").lim(*limits)
    text: str = figure.build().string()
    figure.clear()
    return text if colour else str(plotext.uncolorize(text))
