"""From measurements of several arms in the same rounds to rows with goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from loadtest.bench.report import Row, at_least, at_most, fact

Measured = Mapping[str, Sequence[float]]
"""Arm -> one value per round; the peer may have fewer rounds, or none where it was left out."""


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios: what both had to bear in a round cancels. NaN without a round in common."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    return statistics.median(ratios) if ratios else math.nan


def facts(measure: str, measured: Measured, unit: str) -> list[Row]:
    """The median of every arm that was measured."""
    return [fact(f"{measure}, {arm}", statistics.median(found), unit) for arm, found in measured.items() if found]


def no_more(measure: str, measured: Measured, ours: str, theirs: str, limit: float) -> Row:
    """Ours over theirs, of something that should be little."""
    value = ratio(measured[ours], measured.get(theirs, ()))
    row = at_most(f"{measure}, {ours}", value, limit, "x", theirs)
    return _left_out(row) if math.isnan(value) else row


def no_less(measure: str, measured: Measured, ours: str, theirs: str, limit: float) -> Row:
    """Ours over theirs, of something that should be much."""
    value = ratio(measured[ours], measured.get(theirs, ()))
    row = at_least(f"{measure}, {ours}", value, limit, "x", theirs)
    return _left_out(row) if math.isnan(value) else row


def best(measured: Measured, arms: Sequence[str]) -> str:
    """Which of the arms has the largest median."""
    return max(arms, key=lambda arm: statistics.median(measured[arm]))


def _left_out(row: Row) -> Row:
    return Row(row.measure, math.nan, row.unit, f"{row.against}, left out", row.goal)
