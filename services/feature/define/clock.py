"""Which of an event's two times counts."""

from __future__ import annotations

import enum


class Clock(enum.StrEnum):
    """Which time of an event decides what a moment may see of it. EVENT shows a model what it could not know."""

    KNOWN = "known"
    EVENT = "event"
