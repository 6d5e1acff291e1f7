"""DISTINCT, TOP_K and QUANTILE as SQL: a table of items per tile, spread over the moments that look back on it.

What an event adds is an item and a weight: for DISTINCT a register and rho, which merges by the greatest; for TOP_K
the code of a label, for QUANTILE the bucket of a value, both counted. Per source, step and label or value:

    cells   tile by tile, the weight of each item
    whole   per moment's tile: the cells of its window, found by an equality join through the offsets 1, 2, ... steps
    held    per moment: those, and the events of its own tile that were known before it
    answers what the items say

Without a window, events and moments stand in one line per entity and item, and running aggregates say what is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.feature.define.definition import Aggregate, Feature
from services.feature.offline.sql_events import MOMENTS, Fragment, Reading, Step, tile_of

_SKETCHES = (Aggregate.DISTINCT, Aggregate.TOP_K, Aggregate.QUANTILE)
_HEX = "0123456789abcdef"
_REGISTERS = 4096
_ALPHA = 0.7213 / (1 + 1.079 / _REGISTERS)
_GAMMA = 1.01 / 0.99
_CENTRE = 2048
"""Added to a bucket's number, so that only values next to 0 have number 0."""


def fragments(reading: Reading) -> Iterator[Fragment]:
    features = [f for f in reading.features if f.aggregate in _SKETCHES]
    keys = dict.fromkeys((f.aggregate, f.value, f.step_us) for f in features)
    for number, key in enumerate(keys):
        yield from _Sketch(reading, number, [f for f in features if (f.aggregate, f.value, f.step_us) == key]).parts()


@dataclass(frozen=True, slots=True)
class _Sketch:
    """Features of one source, aggregate, step, and value or label; their windows and parameters may differ."""

    reading: Reading
    number: int
    features: Sequence[Feature]

    @property
    def aggregate(self) -> Aggregate:
        return self.features[0].aggregate

    @property
    def step_us(self) -> int:
        return self.features[0].step_us

    @property
    def windows(self) -> Sequence[int]:
        return list(dict.fromkeys(f.window_us for f in self.features))

    @property
    def merged(self) -> str:
        """How weights become one."""
        return "max" if self.aggregate is Aggregate.DISTINCT else "sum"

    def _named(self, what: str, *more: object) -> str:
        return self.reading.table(what, self.number, *more)

    def parts(self) -> Iterator[Fragment]:
        steps = [self._items(), *(self._held_within() if self.step_us else self._held_ever())]
        for number, window_us in enumerate(self.windows):
            features = [f for f in self.features if f.window_us == window_us]
            yield from self._answers(steps, number, features)
            steps = []

    def _items(self) -> Step:
        """Every event that adds something: e, tile, at_us, seq, item, weight."""
        tile = tile_of("at_us", self.step_us) if self.step_us else "CAST(0 AS BIGINT)"
        keys = f"e, {tile} AS tile, at_us, seq"
        if self.aggregate is Aggregate.QUANTILE:
            value = f"f{self.reading.values.index(self.features[0].value)}"
            query = f"SELECT {keys}, {_bucket(value)} AS item, 1 AS weight FROM {self.reading.events} WHERE {value} IS NOT NULL"  # noqa: S608, E501
        else:
            label = f"l{self.reading.labels.index(self.features[0].value)}"
            hashed = f"SELECT *, md5({label}) AS h FROM {self.reading.events} WHERE {label} IS NOT NULL"  # noqa: S608
            if self.aggregate is Aggregate.TOP_K:
                item, weight = _number("h", 6), "1"
            else:
                hashed = f"SELECT *, ltrim(substr(h, 4, 13), '0') AS rest FROM ({hashed}) AS hashed"  # noqa: S608
                item, weight = _number("h", 3), _rho("rest")
            query = f"SELECT {keys}, {item} AS item, {weight} AS weight FROM ({hashed}) AS hashed"  # noqa: S608
        return self.reading.step(self._named("items"), query)

    def _held_within(self) -> Iterator[Step]:
        items, asked, offsets, cells = (self._named(what) for what in ("items", "asked", "offsets", "cells"))
        whole, held = self._named("whole"), self._named("held")
        own = tile_of("t", self.step_us)
        yield self.reading.step(asked, f"SELECT DISTINCT e, {own} AS tile FROM {MOMENTS}")  # noqa: S608
        backs = ", ".join(f"({n})" for n in range(1, max(self.windows) // self.step_us + 1))
        yield self.reading.step(offsets, f"SELECT n FROM (VALUES {backs}) AS backs (n)")  # noqa: S608
        yield self.reading.step(
            cells,
            f"SELECT e, tile, item, {self.merged}(weight) AS weight FROM {items} GROUP BY e, tile, item",  # noqa: S608
        )
        in_window = [f"CASE WHEN n <= {window_us // self.step_us} THEN weight END" for window_us in self.windows]
        merged = ", ".join(f"{self.merged}({weight}) AS weight_{w}" for w, weight in enumerate(in_window))
        query = f"""
SELECT a.e, a.tile, c.item, {merged}
FROM {asked} AS a CROSS JOIN {offsets} AS o
JOIN {cells} AS c ON c.e = a.e AND c.tile = a.tile - CAST(o.n AS BIGINT) * {self.step_us}
GROUP BY a.e, a.tile, c.item"""  # noqa: S608
        yield self.reading.step(whole, query)
        weights = range(len(self.windows))
        moments = f"(SELECT e, t, {own} AS tile FROM {MOMENTS}) AS m"  # noqa: S608
        query = f"""
SELECT e, t, item, {", ".join(f"{self.merged}(weight_{w}) AS weight_{w}" for w in weights)}
FROM (
    SELECT m.e, m.t, w.item, {", ".join(f"w.weight_{w}" for w in weights)}
    FROM {moments} JOIN {whole} AS w ON w.e = m.e AND w.tile = m.tile
    UNION ALL SELECT m.e, m.t, i.item, {", ".join(f"i.weight AS weight_{w}" for w in weights)}
    FROM {moments} JOIN {items} AS i ON i.e = m.e AND i.tile = m.tile WHERE i.at_us < m.t
) AS both_parts
GROUP BY e, t, item"""  # noqa: S608
        yield self.reading.step(held, query)

    def _held_ever(self) -> Iterator[Step]:
        items = self._named("items")
        in_order = "PARTITION BY e, item ORDER BY t, k, seq"
        query = f"""
SELECT e, t, item, weight_0 FROM (
    SELECT e, t, item, k, {self.merged}(weight) OVER ({in_order} ROWS UNBOUNDED PRECEDING) AS weight_0
    FROM (
        SELECT e, item, at_us AS t, 1 AS k, seq, weight FROM {items}
        UNION ALL SELECT m.e, i.item, m.t, 0, CAST(0 AS BIGINT), CAST(NULL AS BIGINT)
        FROM {MOMENTS} AS m JOIN (SELECT DISTINCT e, item FROM {items}) AS i ON i.e = m.e
    ) AS line
) AS counted
WHERE k = 0"""  # noqa: S608
        yield self.reading.step(self._named("held"), query)

    def _answers(self, steps: Sequence[Step], window: int, features: Sequence[Feature]) -> Iterator[Fragment]:
        held = f"(SELECT e, t, item, weight_{window} AS weight FROM {self._named('held')} WHERE weight_{window} > 0) AS held"  # noqa: S608, E501
        table = self._named("answers", window)
        if self.aggregate is Aggregate.DISTINCT:
            columns = {f.name: f"coalesce({table}.estimate, 0)" for f in features}
            query = _estimates(held)
        elif self.aggregate is Aggregate.TOP_K:
            columns = {column: f"{table}.top{n}" for f in features for n, column in enumerate(f.columns, 1)}
            query = _tops(held, max(int(f.parameter) for f in features))
        else:
            columns = {f.name: f"{table}.p{number}" for number, f in enumerate(features)}
            query = _quantiles(held, [f.parameter for f in features])
        yield Fragment([*steps, self.reading.step(table, query)], table, columns)


def _number(text: str, digits: int) -> str:
    """The first hexadecimal digits of a text as an integer."""
    places = (f"{16 ** (digits - at)} * (strpos('{_HEX}', substr({text}, {at}, 1)) - 1)" for at in range(1, digits + 1))
    return f"CAST({' + '.join(places)} AS BIGINT)"


def _rho(rest: str) -> str:
    """1 and the leading zero bits of 13 hexadecimal digits. rest: those digits without the zeros they begin with."""
    first = f"substr({rest}, 1, 1)"
    small = f"WHEN {first} >= '4' THEN 1 WHEN {first} >= '2' THEN 2 ELSE 3 END"
    bits = f"CASE WHEN {rest} = '' OR {first} >= '8' THEN 0 {small}"
    return f"CAST(1 + 4 * (13 - length({rest})) + {bits} AS BIGINT)"


def _bucket(value: str) -> str:
    # engines may evaluate what a CASE would leave out, so that nothing here can fail for any number
    size = f"CASE WHEN abs({value}) BETWEEN 1e-9 AND 1e300 THEN abs({value}) ELSE 1e0 END"
    sign = f"CASE WHEN abs({value}) < 1e-9 THEN 0 WHEN {value} > 0 THEN 1 ELSE -1 END"
    return f"({sign}) * ({_CENTRE} + CAST(ceil(ln({size}) / {_float(math.log(_GAMMA))}) AS BIGINT))"


def _float(number: float) -> str:
    """A literal that engines take for float64; without an exponent it would be a decimal."""
    return f"{number:.17e}"


def _estimates(held: str) -> str:
    m = float(_REGISTERS)
    inverse = f"(sum(power(2e0, -weight)) + {_float(m)} - count(*))"
    estimate = f"{_float(_ALPHA * m * m)} / {inverse}"
    empty = f"({_float(m)} - count(*))"
    return f"""
SELECT e, t,
CASE WHEN {estimate} <= {_float(2.5 * m)} AND count(*) < {_REGISTERS} THEN {_float(m)} * ln({_float(m)} / {empty})
ELSE {estimate} END AS estimate
FROM {held} GROUP BY e, t"""  # noqa: S608


def _tops(held: str, k: int) -> str:
    tops = ", ".join(f"max(CASE WHEN rank_of = {n} THEN item END) AS top{n}" for n in range(1, k + 1))
    ranked = f"""
SELECT e, t, item, row_number() OVER (PARTITION BY e, t ORDER BY weight DESC, item) AS rank_of FROM {held}"""  # noqa: S608
    return f"SELECT e, t, {tops} FROM ({ranked}) AS ranked WHERE rank_of <= {k} GROUP BY e, t"  # noqa: S608


def _quantiles(held: str, shares: Sequence[float]) -> str:
    found = ", ".join(
        f"min(CASE WHEN so_far > {_float(share)} * (n - 1) THEN item END) AS b{at}" for at, share in enumerate(shares)
    )
    counted = f"""
SELECT e, t, item, sum(weight) OVER (PARTITION BY e, t ORDER BY item ROWS UNBOUNDED PRECEDING) AS so_far,
sum(weight) OVER (PARTITION BY e, t) AS n FROM {held}"""  # noqa: S608
    values = []
    for at in range(len(shares)):
        size = f"{_float(2 / (_GAMMA + 1))} * power({_float(_GAMMA)}, abs(b{at}) - {_CENTRE})"
        values.append(f"CASE WHEN b{at} = 0 THEN 0 WHEN b{at} > 0 THEN {size} ELSE -({size}) END AS p{at}")
    return f"""
SELECT e, t, {", ".join(values)} FROM (
    SELECT e, t, {found} FROM ({counted}) AS counted GROUP BY e, t
) AS buckets"""  # noqa: S608
