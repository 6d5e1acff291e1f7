"""Lengths of time, and the grid that windows end on.

A window looks back from a moment T to the last step of its resolution at or before T - window: its far end moves in
steps, so that the past can be kept as one partial aggregate per step (a tile), while its near end is exact.

    lower = (T // resolution - window // resolution) * resolution      an event counts where lower <= known < T

Batch, stream and request all round like this; rounding differently would be skew.
"""

from __future__ import annotations

import re

_LENGTH = re.compile(r"([1-9][0-9]{0,3})([smhd])")
_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_LADDER = ("1d", "1h", "5m", "1m", "10s", "1s")
_FEWEST_STEPS = 12  # a window is never more than a twelfth too long, where its length allows
MOST_STEPS = 1024


class WindowError(ValueError):
    """A length that is none, or a resolution that does not fit its window."""


def length_us(text: str) -> int:
    """Microseconds in a whole number and s, m, h or d, as in "90s", "24h" or "7d"."""
    if not isinstance(text, str) or not (match := _LENGTH.fullmatch(text)):
        raise WindowError(f"a window must be 1 to 9999 followed by s, m, h or d, got {text!r}")
    return int(match[1]) * _UNIT_US[match[2]]


def resolution_us(window: str, resolution: str = "") -> int:
    """Microseconds in one step: the resolution, or the coarsest of 1d, 1h, 5m, 1m, 10s, 1s that gives 12 steps."""
    window_us = length_us(window)
    if resolution:
        step_us = length_us(resolution)
        if window_us % step_us:
            raise WindowError(f"a resolution must divide its window {window!r}, got {resolution!r}")
    else:
        steps = [length_us(step) for step in _LADDER]
        fitting = [step_us for step_us in steps if window_us % step_us == 0]
        step_us = next((step for step in fitting if window_us // step >= _FEWEST_STEPS), fitting[-1])
    if window_us // step_us > MOST_STEPS:
        raise WindowError(f"a window must have at most {MOST_STEPS} steps, got {window!r} in steps of {step_us} us")
    return step_us
