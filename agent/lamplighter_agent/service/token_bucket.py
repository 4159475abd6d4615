"""How much one client may ask: a bucket of tokens for each, filled at a steady rate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MAX_CLIENTS: Final = 1024


class TokenBuckets:
    """One bucket a client; a client that has not asked for long, and thus has a full one, is forgotten.

    Args:
        rate_per_s: Tokens that each bucket gains a second.
        burst: Tokens that a bucket holds.
    """

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: str, now_s: float) -> float:
        """Take a token.

        Args:
            client: Whose bucket.
            now_s: The time, by a monotonic clock.

        Returns:
            0.0 if there was one, otherwise the seconds until there is.
        """
        tokens, filled_s = self._buckets.pop(client, (float(self._burst), now_s))
        tokens = min(self._burst, tokens + (now_s - filled_s) * self._rate_per_s)
        wait_s = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self._rate_per_s
        self._buckets[client] = (tokens - 1.0 if wait_s == 0.0 else tokens, now_s)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait_s
