"""The maintenance window: the time of day in which a package that is ready may be tried and activated."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, NamedTuple

from msgspec import Meta

WindowText = Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]
"""``HH:MM-HH:MM`` in local time; the end may lie on the next day."""

_DAY_MINUTES = 24 * 60


class Window(NamedTuple):
    """A part of every day.

    Attributes:
        begin_minute: First minute, counted from midnight.
        minutes: Length.
    """

    begin_minute: int
    minutes: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read a ``WindowText``; equal ends mean the whole day."""
        begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in text.split("-"))
        return cls(begin, (end - begin) % _DAY_MINUTES or _DAY_MINUTES)

    def seconds_until_open(self, local: datetime) -> float:
        """Return how long it is until the window opens; 0 inside it."""
        if self.minutes == _DAY_MINUTES:
            return 0.0
        begin = local.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(minutes=self.begin_minute)
        if begin > local:
            yesterday = begin - timedelta(days=1)
            return 0.0 if local < yesterday + timedelta(minutes=self.minutes) else (begin - local).total_seconds()
        if local < begin + timedelta(minutes=self.minutes):
            return 0.0
        return (begin + timedelta(days=1) - local).total_seconds()
