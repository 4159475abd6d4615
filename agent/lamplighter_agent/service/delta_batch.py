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
        send: Takes the text.
    """

    def __init__(self, interval_s: float, send: Callable[[str], None]) -> None:
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
            self._send(text)
            self._next_s = asyncio.get_running_loop().time() + self._interval_s


class DeltaBatches:
    """A batch for each of a request's answers, and one count of all that was sent.

    Args:
        interval_s: Least time between two deltas of an answer.
        send: Takes the sequence number, the answer's index and the text.

    Attributes:
        sent: Deltas so far.
    """

    def __init__(self, interval_s: float, send: Callable[[int, int, str], None]) -> None:
        self.sent = 0
        self._interval_s = interval_s
        self._send = send
        self._batches: dict[int, DeltaBatch] = {}

    def add(self, index: int, text: str) -> None:
        """Take in text of an answer."""
        batch = self._batches.get(index)
        if batch is None:
            batch = self._batches[index] = DeltaBatch(self._interval_s, lambda piece: self._count(index, piece))
        batch.add(text)

    def close(self) -> None:
        """Send what is left."""
        for batch in self._batches.values():
            batch.close()

    def _count(self, index: int, text: str) -> None:
        self._send(self.sent, index, text)
        self.sent += 1
