"""Whether this device's clock can be right. Many boxes have no battery and begin in 1970 until the network tells them.

A wrong clock is reported and taken into account; it never stops the package in use.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple

ClockCode = Literal["ok", "clock_behind", "clock_ahead"]

RELEASED: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""No clock of a device that runs this code can rightly show less."""

_TOLERANCE: Final = timedelta(days=1)
_LONGEST_ABSENCE: Final = timedelta(days=400)
_LIFETIME: Final = timedelta(days=3650)


class ClockVerdict(NamedTuple):
    """What the clock looks like.

    Attributes:
        code: ``ok``, ``clock_behind`` or ``clock_ahead``; part of the protocol.
        message: One sentence with the values.
        passed: A time that has passed for certain, whatever the clock shows.
    """

    code: ClockCode
    message: str
    passed: datetime


def now() -> datetime:
    """Return the clock's time, aware."""
    return datetime.now(UTC)


def judge_clock(time: datetime, confirmed: datetime | None) -> ClockVerdict:
    """Judge the clock.

    Args:
        time: What it shows.
        confirmed: The latest time at which it agreed with freshly signed metadata, or None.
    """
    passed = max(RELEASED, confirmed or RELEASED)
    if time < passed - _TOLERANCE:
        return ClockVerdict(
            "clock_behind", f"the clock shows {time:%Y-%m-%d}, but {passed:%Y-%m-%d} has passed", passed
        )
    latest = confirmed + _LONGEST_ABSENCE if confirmed else RELEASED + _LIFETIME
    if time > latest:
        known = f"it was {confirmed:%Y-%m-%d} when the repository was last seen" if confirmed else "no update ever came"
        return ClockVerdict("clock_ahead", f"the clock shows {time:%Y-%m-%d}, but {known}", passed)
    return ClockVerdict("ok", f"the clock shows {time:%Y-%m-%d}", passed)
