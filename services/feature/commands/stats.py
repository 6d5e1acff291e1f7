"""What an online store holds of each view: how much, how fresh, and how its values are distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.feature.commands.sampling import SampledRows
from services.feature.commands.stored import UnreadableStates, opened
from services.feature.define.definition import View
from services.feature.online.catalogue import PublishedView
from services.feature.online.packed import EXPIRED, MISSING, OK

QUANTILES = (0.1, 0.5, 0.9)
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ColumnStats:
    """Of the sampled rows. null: share, 0 to 1, NaN without rows. p10, p50, p90: of finite values, NaN without any."""

    column: str
    null: float
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class ViewStats:
    """rows: that the newest materialisation wrote. sampled: that were looked at.

    bytes: of keys and values, as the sample has them; None without a sample. age_s: since the watermark.
    expired, unreadable: shares of the sample, 0 to 1. row_age_s: of the sampled rows, the 10th, 50th and 90th
    percentile; NaN without any. note: why columns are not told.
    """

    view: str
    entity: str
    kind: str
    generation: int
    rows: int
    sampled: int
    bytes: int | None
    watermark_us: int
    age_s: float
    row_age_s: Sequence[float]
    expired: float
    unreadable: float
    columns: Sequence[ColumnStats]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Looked:
    """stats, and the values they rest on: column -> finite values, for plots."""

    stats: ViewStats
    values: Mapping[str, Floats]


def look(
    published: PublishedView, defined: View | None, sample: SampledRows, now_us: int, complete_us: int = 0
) -> Looked:
    """complete_us: see `services.feature.commands.stored.opened`."""
    n, note = len(sample.rows), ""
    columns: list[ColumnStats] = []
    values: dict[str, Floats] = {}
    ages, expired, unreadable = np.zeros(0), float("nan"), float("nan")
    try:
        found = opened(published, defined, sample.rows, now_us, complete_us)
    except UnreadableStates as error:
        note = str(error)
    else:
        there = found.plain[:, 0] != MISSING
        ages = (now_us - found.event_us[there]) * 1e-6
        if n:
            expired = float((found.status[there, 0] == EXPIRED).sum() / n)
            unreadable = float(1.0 - there.mean())
        for at, name in enumerate(published.columns):
            ok = found.plain[there, at] == OK
            given = found.values[there, at][ok]
            values[name] = given[np.isfinite(given)]
            null = float(1.0 - ok.mean()) if len(ok) else float("nan")
            columns.append(ColumnStats(name, null, *_quantiles(values[name])))
    watermark_us = max(published.watermark_us, complete_us)
    size = round(published.rows * sample.bytes / n) if n else None
    stats = ViewStats(
        view=published.name,
        entity=published.entity,
        kind=published.kind,
        generation=published.generation,
        rows=published.rows,
        sampled=n,
        bytes=size,
        watermark_us=watermark_us,
        age_s=(now_us - watermark_us) * 1e-6 if watermark_us else float("nan"),
        row_age_s=_quantiles(ages),
        expired=expired,
        unreadable=unreadable,
        columns=columns,
        note=note,
    )
    return Looked(stats, values)


def _quantiles(values: NDArray[np.floating]) -> tuple[float, ...]:
    if not len(values):
        return (float("nan"),) * len(QUANTILES)
    return tuple(float(q) for q in np.quantile(values, QUANTILES))
