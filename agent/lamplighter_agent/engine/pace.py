"""How large a chunk of a prompt may be while other requests wait for their tokens."""

from __future__ import annotations

from typing import Final

_STALL_S: Final = 0.25
"""A chunk may keep the tokens of others waiting this long …"""

_LEAST_TOKENS: Final = 16
"""… but is not made smaller than this, where a token of a prompt costs as much as a decode step."""

_NEWEST_WEIGHT: Final = 0.25


class ChunkPace:
    """Chooses chunk sizes by the measured rate.

    Args:
        most_tokens: Tokens of a chunk at most, which is its size where nobody waits.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._rate = 0.0

    def tokens(self, *, others_wait: bool) -> int:
        """Return the size of the next chunk."""
        if not others_wait or not self._rate:
            return self._most
        return min(self._most, max(int(self._rate * _STALL_S), _LEAST_TOKENS))

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a chunk's time; the last piece of a prompt may be too small to tell."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self._rate += (tokens / seconds - self._rate) * (_NEWEST_WEIGHT if self._rate else 1.0)
