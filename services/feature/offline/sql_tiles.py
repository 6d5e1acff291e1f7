"""COUNT, SUM, MEAN, STD, MIN and MAX as SQL: whole tiles before the moment's own, and the events of its own tile.

Per source and step:

    running  events and moments in one line per (entity, tile): what was counted of the tile up to each of them. At a
             moment this is the head of its window; at the end of the line it is the whole tile
    frames   tiles and the tiles of moments in one line per entity: RANGE frames of the windows' lengths over them
    merged   head and frames together

Nothing is ever subtracted to leave a window, so that an event outside it leaves no trace. Deviations are kept as
(n, mean, M2); that of a frame of tiles follows from the covariances of their means m with their sums s and counts n:

    M2 = sum(M2) + sum(n * (m - mean)^2) = sum(M2) + tiles * (covar(m, s) - mean * covar(m, n))

and covariances are centred by the engine. Without a window there is one tile for all time, and only its head.

DuckDB has a form of its own: see sql_frames.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.feature.define.definition import Aggregate, Feature
from services.feature.offline import sql_frames
from services.feature.offline.sql_events import MOMENTS, SCALARS, Fragment, Reading, Step, distinct, tile_of


def fragments(reading: Reading) -> Iterator[Fragment]:
    """One per step of the source's windows."""
    features = [f for f in reading.features if f.aggregate in SCALARS]
    if reading.dialect.own_forms:
        yield from sql_frames.fragments(reading, features)
        return
    for step_us in dict.fromkeys(f.step_us for f in features):
        yield _Level(reading, step_us, [f for f in features if f.step_us == step_us]).fragment()


@dataclass(frozen=True, slots=True)
class _Slot:
    """A partial aggregate of events, of tiles, and of windows. value: its number, None for the events themselves."""

    kind: str
    value: int | None = None

    @property
    def name(self) -> str:
        return self.kind if self.value is None else f"{self.kind}{self.value}"

    def of_events(self, total: str, over: str) -> str:
        v = f"f{self.value}"
        return {
            "c": f"count(CASE WHEN k = 1 THEN 1 END) {over}",
            "n": f"count({v}) {over}",
            "s": f"{total}({v}) {over}",
            "q": f"var_pop({v}) {over} * count({v}) {over}",
            "lo": f"min({v}) {over}",
            "hi": f"max({v}) {over}",
        }[self.kind]

    def of_tiles(self, total: str, over: str) -> str:
        if self.kind in ("lo", "hi"):
            return f"{'min' if self.kind == 'lo' else 'max'}({self.name}) {over}"
        return f"{'sum' if self.kind in 'cn' else total}({self.name}) {over}"


@dataclass(frozen=True, slots=True)
class _Level:
    """The features of one source and step."""

    reading: Reading
    step_us: int
    features: Sequence[Feature]

    def fragment(self) -> Fragment:
        table = self._named("merged") if self.step_us else self._named("running")
        steps = [self._running()]
        if self.step_us:
            steps += [*self._frames(), self._merged()]
        return Fragment(steps, table, {f.name: self._answer(f, table) for f in self.features})

    @property
    def windows(self) -> Sequence[int]:
        """Lengths, microseconds."""
        return list(dict.fromkeys(f.window_us for f in self.features))

    @property
    def slots(self) -> Sequence[_Slot]:
        slots = [_Slot("c")]
        for feature in self.features:
            if feature.value:
                at = self.reading.values.index(feature.value)
                slots += [_Slot(kind, at) for kind in _NEEDS[feature.aggregate]]
        return list(dict.fromkeys(slots))

    @property
    def windowed_slots(self) -> Sequence[_Slot]:
        """Those that are wanted of windows; events are also counted to tell empty tiles."""
        counts = any(f.aggregate is Aggregate.COUNT and not f.value for f in self.features)
        return self.slots if counts else self.slots[1:]

    @property
    def deviating(self) -> Sequence[int]:
        """Values whose deviation is wanted."""
        return [slot.value for slot in self.slots if slot.kind == "q" and slot.value is not None]

    def _named(self, what: str) -> str:
        return self.reading.table(what, self.step_us)

    def _running(self) -> Step:
        """All time: the head at every moment. Else also the last row of every tile."""
        values = distinct(f"f{slot.value}" for slot in self.slots if slot.value is not None)

        def tile(time: str) -> str:
            return tile_of(time, self.step_us) if self.step_us else "CAST(0 AS BIGINT)"

        nulls = "".join(f", CAST(NULL AS DOUBLE) AS {value}" for value in values)
        line = f"""
    SELECT e, {tile("at_us")} AS tile, at_us AS t, 1 AS k, seq{"".join(f", {v}" for v in values)}
    FROM {self.reading.events}
    UNION ALL SELECT e, {tile("t")}, t, 0, CAST(0 AS BIGINT){nulls} FROM {MOMENTS}"""  # noqa: S608
        # at the same microsecond a moment (0) comes before the events (1), which are not yet known at it
        in_order = "PARTITION BY e, tile ORDER BY t, k, seq"
        over = f"OVER ({in_order} ROWS UNBOUNDED PRECEDING)"
        slots = "".join(f", {s.of_events(self.reading.dialect.total, over)} AS {s.name}" for s in self.slots)
        query = f"""
SELECT * FROM (
    SELECT e, tile, t, k, CASE WHEN lead(k) OVER ({in_order}) IS NULL THEN 1 ELSE 0 END AS is_end{slots}
    FROM ({line}) AS line
) AS counted
WHERE k = 0{" OR is_end = 1" if self.step_us else ""}"""  # noqa: S608
        return self.reading.step(self._named("running"), query)

    def _frames(self) -> Iterator[Step]:
        """Per moment's tile and window w: slot_w over the window's whole tiles."""
        running, table, frames = (self._named(what) for what in ("running", "line", "frames"))
        slots = [slot.name for slot in self.windowed_slots]
        slots += [f"s{at} / nullif(n{at}, 0) AS m{at}" for at in self.deviating]
        tiles = f"SELECT {', '.join(('e', 'tile', '1 AS k', *slots))} FROM {running} WHERE is_end = 1 AND c > 0"  # noqa: S608
        asked = f"SELECT DISTINCT e, tile, 0 AS k{self._nulls()} FROM {running} WHERE k = 0"  # noqa: S608
        line = f"{tiles} UNION ALL {asked}"
        yield self.reading.step(table, line)
        overs = [
            f"OVER (PARTITION BY e ORDER BY tile RANGE BETWEEN {window_us} PRECEDING AND 1 PRECEDING)"
            for window_us in self.windows
        ]
        columns = [f"{found} AS {name}_{w}" for w, over in enumerate(overs) for name, found in self._over_tiles(over)]
        query = f"SELECT * FROM (SELECT e, tile, k, {', '.join(columns)} FROM {table}) AS framed WHERE k = 0"  # noqa: S608
        yield self.reading.step(frames, query)

    def _nulls(self) -> str:
        names = [*(slot.name for slot in self.windowed_slots), *(f"m{at}" for at in self.deviating)]
        return "".join(f", CAST(NULL AS DOUBLE) AS {name}" for name in names)

    def _over_tiles(self, over: str) -> Iterator[tuple[str, str]]:
        for slot in self.windowed_slots:
            yield slot.name, slot.of_tiles(self.reading.dialect.total, over)
        for at in self.deviating:
            yield f"tiles{at}", f"count(m{at}) {over}"
            yield f"ms{at}", f"covar_pop(m{at}, s{at}) {over}"
            yield f"mn{at}", f"covar_pop(m{at}, n{at}) {over}"

    def _merged(self) -> Step:
        columns = [
            f"{expression} AS {slot.name}_{w}"
            for w in range(len(self.windows))
            for slot in self.windowed_slots
            for expression in [_MERGE[slot.kind].format(a=f"f.{slot.name}_{w}", b=f"h.{slot.name}", i=slot.value, w=w)]
        ]
        running, frames = self._named("running"), self._named("frames")
        query = f"""
SELECT h.e, h.t, {", ".join(columns)}
FROM {running} AS h JOIN {frames} AS f ON f.e = h.e AND f.tile = h.tile WHERE h.k = 0"""  # noqa: S608
        return self.reading.step(self._named("merged"), query)

    def _answer(self, feature: Feature, table: str) -> str:
        window = f"_{self.windows.index(feature.window_us)}" if self.step_us else ""
        at = self.reading.values.index(feature.value) if feature.value else None

        def slot(kind: str) -> str:
            return f"{table}.{_Slot(kind, at).name}{window}"

        return {
            Aggregate.COUNT: lambda: f"coalesce({slot('n' if feature.value else 'c')}, 0)",
            Aggregate.SUM: lambda: f"coalesce({slot('s')}, 0)",
            Aggregate.MEAN: lambda: f"{slot('s')} / nullif({slot('n')}, 0)",
            Aggregate.STD: lambda: f"sqrt({slot('q')} / nullif({slot('n')}, 0))",
            Aggregate.MIN: lambda: slot("lo"),
            Aggregate.MAX: lambda: slot("hi"),
        }[feature.aggregate]()


_NEEDS = {
    Aggregate.COUNT: ("n",),
    Aggregate.SUM: ("s",),
    Aggregate.MEAN: ("n", "s"),
    Aggregate.STD: ("n", "s", "q"),
    Aggregate.MIN: ("lo",),
    Aggregate.MAX: ("hi",),
}

# a: of the frame, b: of the head; null where there was nothing
_ADDED = "CASE WHEN {a} IS NULL THEN {b} WHEN {b} IS NULL THEN {a} ELSE {a} + {b} END"
_COUNTED = "coalesce({a}, 0) + coalesce({b}, 0)"
_BETWEEN_TILES = "f.tiles{i}_{w} * (f.ms{i}_{w} - f.s{i}_{w} / f.n{i}_{w} * f.mn{i}_{w})"
_WITHIN = f"({{a}} + CASE WHEN {_BETWEEN_TILES} > 0 THEN {_BETWEEN_TILES} ELSE 0 END)"
_APART = "(h.s{i} / h.n{i} - f.s{i}_{w} / f.n{i}_{w})"
_SHARED = "(h.n{i} * f.n{i}_{w} / (h.n{i} + f.n{i}_{w}))"
_MERGE = {
    "c": _COUNTED,
    "n": _COUNTED,
    "s": _ADDED,
    "q": (
        "CASE WHEN coalesce(f.n{i}_{w}, 0) = 0 THEN {b} WHEN coalesce(h.n{i}, 0) = 0 THEN "
        f"{_WITHIN} ELSE {_WITHIN} + {{b}} + {_APART} * {_APART} * {_SHARED} END"
    ),
    "lo": "CASE WHEN {a} <= {b} OR {b} IS NULL THEN {a} ELSE {b} END",
    "hi": "CASE WHEN {a} >= {b} OR {b} IS NULL THEN {a} ELSE {b} END",
}
