"""Moments as people write and read them."""

from __future__ import annotations

import re
import time
from datetime import UTC, date, datetime

_NUMBER = re.compile(r"-?[0-9]+")
_LATEST_US = 2**53


def now_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def moment_us(text: str) -> int:
    """Microseconds since 1970 UTC of an ISO 8601 moment, UTC unless it says otherwise, or of that number itself.

    Raises ValueError saying what is allowed.
    """
    try:
        if _NUMBER.fullmatch(text):
            found = int(text)
        else:
            moment = datetime.fromisoformat(text)
            aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            since = aware - datetime(1970, 1, 1, tzinfo=UTC)
            found = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    except ValueError:
        raise ValueError(f"a moment must be ISO 8601 or microseconds since 1970, got {text!r}") from None
    if not 0 < found <= _LATEST_US:
        raise ValueError(f"a moment must be between 1970 and 2255, got {text!r}")
    return found


def day(text: str) -> date:
    """Raises ValueError saying what is allowed."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"a day must be YYYY-MM-DD, got {text!r}") from None


def iso(us: int) -> str:
    """The moment with milliseconds, "2013-01-01T05:00:00.000Z"; empty for 0."""
    if not us:
        return ""
    moment = datetime.fromtimestamp(us // 1_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{us % 1_000_000 // 1000:03d}Z"


def age(seconds: float) -> str:
    """As people say it: "3.2 s", "4 m 10 s", "2 d 3 h"; "never" where it is not a number."""
    if seconds != seconds:
        return "never"
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 60:
        return f"{sign}{seconds:.1f} s"
    whole = round(seconds)
    for unit, smaller, per, small_per in (("d", "h", 86_400, 3_600), ("h", "m", 3_600, 60), ("m", "s", 60, 1)):
        if whole >= per:
            rest = whole % per // small_per
            return f"{sign}{whole // per} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{sign}{whole} s"
