"""States into rows: windows end at the moment of reading, so they decay without events.

What to do is worked out once per view; a call then works on the tiles of all its entities together, with a number of
numpy calls that hangs on neither entities nor features. Those calls are what a row of one entity costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import Aggregate, Feature
from services.feature.define.rows import Computed
from services.feature.tiles.places import owner_places
from services.feature.tiles.plan import ENDLESS_US, Plan, steps_of
from services.feature.tiles.state import NEWEST, NULL_BITS, OLDEST, Opened, Words
from services.feature.tiles.summaries import summaries_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_READY = 128  # entities of a call for which constants are at hand


class _Columns:
    """What the plan says of a view's columns: kind by kind, as arrays with a number per column.

    copies: column of the sums.
    ratios: column of the counts, beside which the totals are. spreads: likewise, then window, column in the tile.
    least: column of the bounds, sign.
    firsts: window, columns of the value and of known_us in the tile.
    lasts: source, which of its events, column, how far back. ages: likewise.
    summaries: nothing.
    windows: run, and -steps; of one run the longest first: the gaps between them, which reduceat sums in vain, are
    then empty.
    """

    def __init__(self, plan: Plan) -> None:
        features = plan.view.features
        tiled = [feature for feature in features if not feature.aggregate.is_recent]
        self.windows = sorted({(plan.run_of(f).number, -steps_of(f)) for f in tiled})
        self.window_of = {f.name: self.windows.index((plan.run_of(f).number, -steps_of(f))) for f in tiled}
        found: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in _WIDTHS}
        self.summary_at: dict[str, int] = {}
        column = 0
        for feature in features:
            if feature.aggregate in _SUMMARISED:
                self.summary_at[feature.name] = len(found["summaries"])
            for kind, row in self._rows(plan, feature):
                found[kind].append((column, *row))
                column += 1
        placed = [row[0] for kind in _WIDTHS for row in found[kind]]
        self.order = None if placed == sorted(placed) else np.argsort(np.array(placed, dtype=np.int64))
        self.any_reach = any(reach < ENDLESS_US for *_, reach in found["lasts"])
        self._found = found

    def of(self, *kinds: str) -> Sequence[Words]:
        """Of these kinds, which must be as wide: one array per number of theirs, (columns,)."""
        rows = [row[1:] for kind in kinds for row in self._found[kind]]
        return tuple(np.array(rows, dtype=np.int64).reshape(len(rows), _WIDTHS[kinds[0]]).T.copy())

    def slice_of(self, *kinds: str) -> slice:
        """Where these kinds, which follow one another, stand in a row that is ordered by kind."""
        before = list(_WIDTHS)[: list(_WIDTHS).index(kinds[0])]
        start = sum(len(self._found[kind]) for kind in before)
        return slice(start, start + sum(len(self._found[kind]) for kind in kinds))

    def _rows(self, plan: Plan, feature: Feature) -> Iterable[tuple[str, tuple[int, ...]]]:
        """A kind and its numbers for each of the feature's columns."""
        kind, value = feature.aggregate, feature.value
        if kind in _SUMMARISED:
            return [("summaries", ())] * len(feature.columns)
        if kind is Aggregate.AGE_S:
            return [("ages", (plan.recent_of(feature).number, 1, 0, ENDLESS_US))]
        if kind.is_recent:
            recent, reach_us = plan.recent_of(feature), feature.window_us or ENDLESS_US
            nths = range(1, 1 + len(feature.columns))
            return [("lasts", (recent.number, nth, recent.columns[value], reach_us)) for nth in nths]
        run, window = plan.run_of(feature), self.window_of[feature.name]
        sums = window * (plan.adds.stop - plan.adds.start) - plan.adds.start
        bounds = window * (plan.bounds.stop - plan.bounds.start) - plan.bounds.start
        if kind is Aggregate.FIRST:
            return [("firsts", (window, run.firsts[value], run.first))]
        if kind is Aggregate.MIN:
            return [("least", (bounds + run.minima[value], 1))]
        if kind is Aggregate.MAX:
            return [("least", (bounds + run.maxima[value], -1))]
        if not value:
            return [("copies", (sums + run.events,))]
        moments = run.moments_of(value)
        if kind is Aggregate.STD:
            return [("spreads", (sums + moments.count, window, moments.count))]
        if kind is Aggregate.MEAN:
            return [("ratios", (sums + moments.count, -1, -1))]
        return [("copies", (sums + (moments.count if kind is Aggregate.COUNT else moments.total),))]


_SUMMARISED = (Aggregate.DISTINCT, Aggregate.TOP_K, Aggregate.QUANTILE)
_WIDTHS = {
    "copies": 1,
    "ratios": 3,
    "spreads": 3,
    "least": 2,
    "firsts": 3,
    "lasts": 4,
    "ages": 4,
    "summaries": 0,
}
"""The kinds of columns, in the order in which they are worked out, and how many numbers each takes."""


class Readout:
    """Rows of one plan."""

    def __init__(self, plan: Plan) -> None:
        columns = _Columns(plan)
        self._plan = plan
        self._width = len(plan.view.columns)
        self._order = columns.order
        self._windows = len(columns.windows)
        self._tile_words = np.array(plan.tile_words)
        self._adds = plan.adds if plan.adds.stop > plan.adds.start else None
        self._bounds = plan.bounds if plan.bounds.stop > plan.bounds.start else None

        self._copies, self._copies_at = columns.of("copies")[0], columns.slice_of("copies")
        self._counts, _, _ = columns.of("ratios", "spreads")
        self._totals, self._spread_sums = self._counts + 1, columns.of("spreads")[0] + 2
        self._ratios_at = columns.slice_of("ratios", "spreads")
        self._spreads, self._spreads_at = columns.of("spreads"), columns.slice_of("spreads")
        self._least, self._least_at = columns.of("least"), columns.slice_of("least")
        self._firsts, self._firsts_at = columns.of("firsts"), columns.slice_of("firsts")
        self._recent_words = np.array(plan.recent_words)
        self._most_recent = sum(recent.most for recent in plan.recents)
        self._recents, self._recents_at = columns.of("lasts", "ages"), columns.slice_of("lasts", "ages")
        _, nth, column, _ = self._recents
        self._recent_from = column - nth * plan.recent_words
        self._lasts, self._any_reach = len(columns.of("lasts")[0]), columns.any_reach
        summaries_at = columns.slice_of("summaries").start
        self._summaries = summaries_of(plan, columns.window_of, columns.summary_at, summaries_at)

        # a window's first tile, and the one after the tile that the last microsecond before the moment is in
        ends = [(run, end) for run, steps in columns.windows for end in (steps, 1)]
        self._before_us = np.tile(np.array([0, 1], dtype=np.int64), self._windows)
        self._steps_us = np.array([plan.runs[run].step_us for run, _ in ends], dtype=np.int64)
        self._ends = np.array(ends, dtype=np.int64).reshape(-1, 2).T.copy()
        self._runs_begin, self._ends_from = self._places(_READY)

    def rows(self, opened: Opened, as_of_us: Words) -> Computed:
        """as_of_us: int64 (k,), or (1,) for all."""
        moments = as_of_us[:, np.newaxis]
        k = len(opened.heads)
        values, null = np.empty((k, self._width)), np.zeros((k, self._width), dtype=np.bool_)
        known = opened.heads[:, OLDEST] < as_of_us
        if k:
            with np.errstate(all="ignore"):
                if self._windows:
                    self._finish_windows(opened, moments, values, null)
                if self._recents_at.stop > self._recents_at.start:
                    self._finish_recents(opened, moments, values[:, self._recents_at], null[:, self._recents_at])
        if self._order is not None:
            values, null = values.take(self._order, axis=1), null.take(self._order, axis=1)
        if np.count_nonzero(known) < k:
            null[~known] = True
        return Computed(values, null, known)

    def _finish_windows(self, opened: Opened, moments: Words, values: Floats, null: Bools) -> None:
        pairs = self._windows_at(opened, moments)
        begin, end = pairs[::2].reshape(-1, self._windows), pairs[1::2].reshape(-1, self._windows)
        none = begin == end
        empty = none.reshape(-1) if np.count_nonzero(none) else None
        tiles = opened.tiles.view(np.float64)
        if self._adds:
            sums = self._reduced(np.add, tiles[:, self._adds], pairs, empty, 0.0)
            self._finish_sums(tiles.reshape(-1), begin, end, sums, values, null)
        if self._bounds:
            source, sign = self._least
            least = self._reduced(np.minimum, tiles[:, self._bounds], pairs, empty, np.inf).take(source, axis=1)
            null[:, self._least_at] = np.isinf(least)
            np.multiply(least, sign, out=values[:, self._least_at])
        if len(self._firsts[0]):
            at = self._firsts_at
            self._finish_firsts(opened.tiles, moments, begin, none, values[:, at], null[:, at])
        for summary in self._summaries:
            summary.finish(opened, begin, end, values, null)

    def _windows_at(self, opened: Opened, moments: Words) -> Words:
        """Where each window's tiles begin and end: begin, end, begin, ..., (2 k windows,)."""
        k = len(opened.heads)
        runs_begin, ends_from = (self._runs_begin, self._ends_from) if k <= _READY else self._places(k)
        lengths = opened.counts[:, : len(self._plan.runs)].ravel()
        at = runs_begin[: len(lengths)].repeat(lengths)
        at += opened.tiles[:-1, 0]
        wanted = ends_from[:k] + (moments - self._before_us) // self._steps_us
        return np.asarray(at.searchsorted(wanted.reshape(-1)))

    def _reduced(self, operation: np.ufunc, columns: Floats, pairs: Words, none: Bools | None, empty: float) -> Floats:
        """Every window's columns taken together, (k, windows * columns)."""
        # of pairs that begin and end windows, every other range is a window
        found = operation.reduceat(columns, pairs, axis=0)[::2]
        if none is not None:
            found[none] = empty
        return np.asarray(found.reshape(-1, self._windows * columns.shape[1]))

    def _finish_sums(
        self, numbers: Floats, begin: Words, end: Words, sums: Floats, values: Floats, null: Bools
    ) -> None:
        if len(self._copies):
            values[:, self._copies_at] = sums.take(self._copies, axis=1)
        if not len(self._counts):
            return
        taken = sums.take(self._counts, axis=1)
        means = sums.take(self._totals, axis=1)
        means /= taken
        values[:, self._ratios_at] = means
        null[:, self._ratios_at] = taken == _NOTHING
        counts, windows, columns = self._spreads
        if spreads := len(counts):
            spread = sums.take(self._spread_sums, axis=1)
            spread += self._between(numbers, begin, end, means[:, -spreads:], windows, columns)
            spread /= taken[:, -spreads:]
            np.sqrt(spread, out=values[:, self._spreads_at])

    def _between(
        self, numbers: Floats, begin: Words, end: Words, means: Floats, windows: Words, columns: Words
    ) -> Floats:
        """The sum over a window's tiles of count * (mean of the tile - mean of the window)**2, (k, features)."""
        width = self._tile_words
        begin = begin.take(windows, axis=1)
        lengths = (end.take(windows, axis=1) - begin).reshape(-1)
        ends = lengths.cumsum()
        starts = ends - lengths
        total = int(ends[-1])
        begin *= width
        begin += columns
        at = np.arange(total)
        at *= width
        at += (begin.reshape(-1) - starts * width).repeat(lengths)
        counts = numbers[at]
        at += _ONE
        away = numbers[at]
        away /= np.maximum(counts, _ONE_EACH)
        away -= means.reshape(-1).repeat(lengths)
        away *= away
        # one more than there are, so that a window without tiles may come last
        squares = np.zeros(total + 1)
        np.multiply(away, counts, out=squares[:-1])
        return np.asarray(np.add.reduceat(squares, starts).reshape(means.shape))

    def _finish_firsts(
        self, tiles: Words, moments: Words, begin: Words, none: Bools, values: Floats, null: Bools
    ) -> None:
        windows, columns, known = self._firsts
        rows = begin.take(windows, axis=1) * tiles.shape[1]
        bits = tiles.reshape(-1)
        found = bits.take(rows + columns)
        null[:] = none.take(windows, axis=1) | (found == NULL_BITS) | (bits.take(rows + known) >= moments)
        values[:] = found.view(np.float64)

    def _finish_recents(self, opened: Opened, moments: Words, values: Floats, null: Bools) -> None:
        if not len(opened.recents):
            null[:] = True
            return
        recent, nth, columns, reach_us = self._recents
        counts, ends, every = self._known_recents(opened, moments)
        at = (ends * self._recent_words).take(recent, axis=1)
        at += self._recent_from
        bits = opened.recents.reshape(-1)
        # where there is no such event, whatever comes instead is null
        found = bits.take(at, mode="wrap")
        np.equal(found, _NULL, out=null)
        if not every:
            null |= counts.take(recent, axis=1) < nth
        if self._any_reach:
            null |= bits.take(at - columns, mode="wrap") < moments - reach_us
        lasts = self._lasts
        if lasts:
            values[:, :lasts] = found.view(np.float64)[:, :lasts]
        if lasts < len(nth):
            np.divide(moments - found[:, lasts:], _US_PER_S, out=values[:, lasts:])

    def _known_recents(self, opened: Opened, moments: Words) -> tuple[Words, Words, bool]:
        """How many of the latest events were known before the moment, and where they end, (k, sources).

        Then whether that is as many as there can be, everywhere.
        """
        runs, kinds = len(self._plan.runs), len(self._plan.recents)
        counts = opened.counts[:, runs : runs + kinds]
        ends = counts.cumsum().reshape(counts.shape)
        if np.count_nonzero(opened.heads[:, NEWEST : NEWEST + 1] >= moments) == 0:
            return counts, ends, len(opened.recents) == len(counts) * self._most_recent
        limit_us = np.broadcast_to(moments, counts.shape).ravel().repeat(counts.ravel())
        before = np.concatenate((_ZERO, (opened.recents[:, 0] < limit_us).cumsum()))
        starts = ends - counts
        counts = before[ends] - before[starts]
        return counts, starts + counts, False

    def _places(self, k: int) -> tuple[Words, Words]:
        """Of each of k entities: tile 0 of each run, (k runs,), and the ends of windows around it, (k, 2 windows)."""
        runs, (run_of, steps) = len(self._plan.runs), self._ends
        begin = owner_places(k * runs)
        return begin, begin.reshape(k, runs)[:, run_of] + steps


_ZERO = np.zeros(1, dtype=np.int64)
# arrays: numpy takes longer over Python's numbers
_NULL, _NOTHING, _ONE = np.array(NULL_BITS), np.array(0.0), np.array(1)
_ONE_EACH, _US_PER_S = np.array(1.0), np.array(1e6)
