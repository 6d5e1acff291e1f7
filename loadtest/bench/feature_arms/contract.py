"""Eight labels whose right features are known, each a case that a point-in-time join gets wrong in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MOMENT_US = 1_768_003_200_000_000  # 2026-01-10 UTC: of every label
TTL_H = 48
_HOUR_US = 3_600_000_000


class Event(NamedTuple):
    entity_id: str
    event_us: int
    seq: int
    x: float | None


class Label(NamedTuple):
    entity_id: str
    case: str
    x: float | None


def _event(entity_id: str, hours: int, seq: int, x: float | None) -> Event:
    return Event(entity_id, MOMENT_US + hours * _HOUR_US, seq, x)


EVENTS = (
    _event("1", -1, 1, 1.0),
    _event("2", +1, 2, 2.0),
    _event("4", -100, 3, 4.0),
    _event("5", 0, 4, 5.0),
    _event("6", -1, 5, 6.1),
    _event("6", -1, 6, 6.2),
    _event("7", -2, 7, 7.0),
    _event("7", -1, 8, None),
)

LABELS = (
    Label("1", "ordinary", 1.0),
    Label("1", "same entity and moment again", 1.0),
    Label("2", "only a later event", None),
    Label("3", "unknown entity", None),
    Label("4", "expired", None),
    Label("5", "event at the label's moment", None),
    Label("6", "two events at one moment: the later in sequence", 6.2),
    Label("7", "latest value is null", None),
)
_AT_THE_MOMENT = "event at the label's moment"


def right_rows(found: Mapping[str, float | None], *, at_the_moment: float | None = None) -> int:
    """How many labels came back with the right value, up to float32.

    found: case -> value; a label that was lost is absent. at_the_moment: what is right for an event at the label's
    moment: ours counts an event from the moment after it was known, Feast from that moment on.
    """
    expected = {label.case: label.x for label in LABELS} | {_AT_THE_MOMENT: at_the_moment}
    return sum(case in found and _same(found[case], x) for case, x in expected.items())


def _same(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) < 1e-6
