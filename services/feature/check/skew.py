"""Whether what was served, or trained on, is what the events say: column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.feature.define.rows import Computed

RELATIVE = 1e-6
"""Values that differ by less are equal: both were rounded to float32 (6e-8), one of them perhaps the other way."""
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class ColumnSkew:
    """One feature, over the rows that could be compared.

    mismatched: rows whose values differ, or of which one is null and the other not. worst: the largest difference,
    relative to the larger value. null_given, null_expected: shares. quantiles_given, quantiles_expected: the 10th,
    50th and 90th percentile, NaN where all are null. shift: Kolmogorov and Smirnov's distance of the two
    distributions, 0 for the same to 1. worst_row: the row with the worst difference, -1 where none differs.
    """

    view: str
    column: str
    rows: int
    mismatched: int
    worst: float
    null_given: float
    null_expected: float
    quantiles_given: tuple[float, ...]
    quantiles_expected: tuple[float, ...]
    shift: float
    worst_row: int

    @property
    def share(self) -> float:
        """Of rows that differ, 0 to 1."""
        return self.mismatched / self.rows if self.rows else 0.0


def compare(
    view: str,
    columns: Sequence[str],
    given: NDArray[np.float32],
    given_null: NDArray[np.bool_],
    expected: Computed,
    *,
    relative: float = RELATIVE,
) -> list[ColumnSkew]:
    """One per column. given: float32 (n, columns), anything where given_null. expected: the same rows, recomputed."""
    if given.shape != expected.values.shape:
        raise ValueError(f"both must have the same shape, got {given.shape} and {expected.values.shape}")
    truth = expected.float32()
    return [
        _column(view, name, given[:, at], given_null[:, at], truth[:, at], expected.null[:, at], relative)
        for at, name in enumerate(columns)
    ]


def _column(
    view: str,
    column: str,
    given: NDArray[np.float32],
    given_null: NDArray[np.bool_],
    truth: NDArray[np.float32],
    truth_null: NDArray[np.bool_],
    relative: float,
) -> ColumnSkew:
    off = _difference(given.astype(np.float64), truth.astype(np.float64))
    off = np.where(given_null | truth_null, np.where(given_null == truth_null, 0.0, np.inf), off)
    ours, theirs = given[~given_null & np.isfinite(given)], truth[~truth_null & np.isfinite(truth)]
    wrong = off > relative
    return ColumnSkew(
        view=view,
        column=column,
        rows=len(given),
        mismatched=int(wrong.sum()),
        worst=float(off.max(initial=0.0)),
        null_given=float(given_null.mean()) if len(given) else 0.0,
        null_expected=float(truth_null.mean()) if len(given) else 0.0,
        quantiles_given=_quantiles(ours),
        quantiles_expected=_quantiles(theirs),
        shift=_shift(ours, theirs),
        worst_row=int(off.argmax()) if wrong.any() else -1,
    )


def _difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative to the larger; 0 where both are the same, infinite where only one is finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), np.finfo(np.float32).tiny)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isfinite(a) & np.isfinite(b), off, np.inf))


def _quantiles(values: NDArray[np.float32]) -> tuple[float, ...]:
    if not len(values):
        return (float("nan"),) * len(_QUANTILES)
    return tuple(float(q) for q in np.quantile(values, _QUANTILES))


def _shift(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if not len(a) or not len(b):
        return 0.0 if len(a) == len(b) else 1.0
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    below_a, below_b = (np.searchsorted(one, both, side="right") / len(one) for one in (a, b))
    return float(np.abs(below_a - below_b).max())
