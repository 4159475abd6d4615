"""How long to wait between two tries to reach the broker."""

from __future__ import annotations

import random
from typing import Final

FIRST_DELAY_S: Final = 1.0
_LEAST_DELAY_S: Final = 0.2


def reconnect_delay_s(tries: int, most_s: float) -> float:
    """Return how long to wait after so many tries in vain: twice as long each time, with full jitter, up to ``most_s``.

    A fleet whose broker comes back must not connect in one moment.
    """
    cap_s = min(most_s, FIRST_DELAY_S * 2 ** min(tries, 16))
    return random.uniform(min(_LEAST_DELAY_S, cap_s), cap_s)  # noqa: S311 (spreads load, guards nothing)
