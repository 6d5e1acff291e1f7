"""What every arm must find: the same question answered by one sort and one binary search, with nothing shared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.bench.feature_arms.sizes import START_US

_ENTITY_US = np.int64(1) << np.int64(43)  # more microseconds than the events span, so that a pair is one number

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def as_of(entity: Ints, event_us: Ints, values: Floats, asked: Ints, moment_us: Ints) -> Floats:
    """The values of each asked entity's latest event before its moment, NaN where there is none.

    entity, event_us: (n,), no pair twice. values: (n, c). asked, moment_us: (m,).
    """
    keys = entity * _ENTITY_US + (event_us - START_US)
    order = np.argsort(keys, kind="stable")
    at = np.searchsorted(keys[order], asked * _ENTITY_US + (moment_us - START_US), "left") - 1
    found = order[np.maximum(at, 0)]
    known = (at >= 0) & (entity[found] == asked)
    return np.where(known[:, None], values[found], np.float32(np.nan))


def wrong_rows(got: Floats, expected: Floats) -> int:
    """How many rows differ in any value; two NaN are the same."""
    if got.shape != expected.shape:
        return max(len(got), len(expected))
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return int((~same.all(axis=1)).sum())
