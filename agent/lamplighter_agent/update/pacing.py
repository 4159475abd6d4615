"""The speed of a download: neither too slow to be worth waiting for nor faster than allowed."""

from __future__ import annotations

import threading
import time

from lamplighter_agent.errors import SlowDownloadError


class SpeedMeter:
    """Gives up on a transfer whose rate over a whole window is too low.

    Args:
        least_bytes_per_s: Lowest accepted rate; 0 accepts any.
        window_s: Length of the window.
    """

    def __init__(self, least_bytes_per_s: int, window_s: float) -> None:
        self._least, self._window_s = least_bytes_per_s, window_s
        self._begin_s, self._count = time.monotonic(), 0

    def count(self, length: int, where: str) -> None:
        """Count bytes that have come.

        Raises:
            SlowDownloadError: If a window has passed and too little has come in it.
        """
        self._count += length
        elapsed_s = time.monotonic() - self._begin_s
        if elapsed_s < self._window_s:
            return
        if self._count < self._least * elapsed_s:
            raise SlowDownloadError(
                f"{where}: {self._count} bytes in {elapsed_s:.0f} s, less than the {self._least} bytes/s asked for"
            )
        self._begin_s, self._count = time.monotonic(), 0

    def excuse(self, pause_s: float) -> None:
        """Leave out time that was spent waiting on purpose."""
        self._begin_s += pause_s


class SpeedLimiter:
    """Spreads the bytes of all threads over time.

    Args:
        most_bytes_per_s: Highest rate of all together, or None.
    """

    def __init__(self, most_bytes_per_s: int | None) -> None:
        self._most = most_bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def delay_s(self, length: int) -> float:
        """Return how long to wait after a block of ``length`` bytes."""
        if self._most is None:
            return 0.0
        with self._lock:
            now_s = time.monotonic()
            self._free_at_s = max(self._free_at_s, now_s) + length / self._most
            return self._free_at_s - now_s
