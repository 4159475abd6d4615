"""Batching of generated text by time: one message a token would cost more than the token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_MAX_DELTA_CHARACTERS: Final = 4096


class DeltaBatch:
    """Collects text and lets it out at once first, then at most once an interval.

    Args:
        interval_s: Least time between two deltas.
        send: Takes the sequence number and the text.
    """

    def __init__(self, interval_s: float, send: Callable[[int, str], None]) -> None:
        self.sent = 0
        self._interval_s = interval_s
        self._send = send
        self._text = ""
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, text: str) -> None:
        """Take in text; it goes out now or soon."""
        self._text += text
        if not self._text:
            return
        now = asyncio.get_running_loop().time()
        if now >= self._next_s or len(self._text) >= _MAX_DELTA_CHARACTERS:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._next_s - now, self._flush)

    def close(self) -> None:
        """Send what is left."""
        self._flush()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._text:
            text, self._text = self._text[:_MAX_DELTA_CHARACTERS], self._text[_MAX_DELTA_CHARACTERS:]
            self._send(self.sent, text)
            self.sent += 1
            self._next_s = asyncio.get_running_loop().time() + self._interval_s
