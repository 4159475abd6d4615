"""Progress on a terminal, or as lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO

from lamplighter_builder.time_left import TimeLeft

_REDRAW_S: Final = 0.2
_LINE_EVERY_S: Final = 10.0
_BAR_WIDTH: Final = 30


class TerminalProgress:
    """Shows stages on a text stream: a bar with the time left on a terminal, a line now and then elsewhere.

    The time left is that of the whole work where the stages to come are known, else that of the stage.

    Args:
        stream: Where to write.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._interactive, self._clock = stream, stream.isatty(), clock
        self._title, self._total, self._done = "", 0, 0
        self._started = self._shown = clock()
        self._time_left: TimeLeft | None = None

    def expect(self, shares: Mapping[str, float]) -> None:
        """Be told which stages will come, with their shares of the time."""
        self._time_left = TimeLeft(shares, self._clock())

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of ``total`` units."""
        self.close()
        self._title, self._total, self._done = title, total, 0
        self._started = self._shown = self._clock()
        if self._time_left is not None:
            self._time_left.begin(title, self._started)
        self._show(force=not self._interactive)

    def advance(self, amount: int) -> None:
        """Report work done since the last call."""
        self._done += amount
        self._show(force=self._done >= self._total)

    def warn(self, text: str) -> None:
        """Write a line of its own, above the stage that is under way."""
        before = "\r\x1b[K" if self._title and self._interactive else ""
        self._stream.write(f"{before}warning: {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line of the last stage."""
        if self._title and self._interactive:
            self._stream.write("\n")
        self._title = ""

    def _show(self, *, force: bool) -> None:
        now = self._clock()
        if not force and now - self._shown < (_REDRAW_S if self._interactive else _LINE_EVERY_S):
            return
        self._shown = now
        share = self._done / self._total if self._total else 0.0
        left = self._left(now, share)
        told = "" if left is None else f", {_duration(left)} left"
        took = f", {_duration(now - self._started)}" if share >= 1 else ""
        if self._interactive:
            bar = ("#" * int(_BAR_WIDTH * share)).ljust(_BAR_WIDTH, ".")
            self._stream.write(f"\r{self._title:20} [{bar}] {share:4.0%}{took}{told}\x1b[K")
        else:
            self._stream.write(f"{self._title}: {share:.0%}{took}{told}\n")
        self._stream.flush()

    def _left(self, now: float, share: float) -> float | None:
        """Return the seconds left of the whole work, or of the stage; None if that is not known."""
        if self._time_left is not None:
            return self._time_left.left(share, now)
        elapsed = now - self._started
        return elapsed / share - elapsed if 0 < share < 1 else None


def _duration(seconds: float) -> str:
    """Return a duration as people write it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
