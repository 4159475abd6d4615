"""How long work will still take: expected shares of its stages, and the pace at which they have gone so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_TELLING_SHARE: Final = 0.05
"""Part of a stage that must be done before its own pace tells more than that of the stages before it."""


class TimeLeft:
    """Estimates the time left, in the unit in which it is told the time.

    The stage at hand goes on at its own pace. Stages to come take as long for their shares as all that is done took for
    its, so that shares need only be right beside each other.

    Args:
        shares: The stages in their order, with their shares of the time in any unit. A stage that never begins is done
            with as soon as a later one begins; one that is not named has no share.
        now: The present time.
    """

    def __init__(self, shares: Mapping[str, float], now: float) -> None:
        self._coming = dict(shares)
        self._share = 0.0
        self._past_share = self._past_time = 0.0
        self._begun = now

    def begin(self, stage: str, now: float) -> None:
        """Begin a stage, which ends the one before."""
        if self._share > 0:
            self._past_share += self._share
            self._past_time += now - self._begun
        self._begun = now
        titles = list(self._coming)
        skipped = titles[: titles.index(stage)] if stage in self._coming else []
        for title in skipped:
            del self._coming[title]
        self._share = self._coming.pop(stage, 0.0)

    def left(self, done: float, now: float) -> float | None:
        """Return the time left of this stage and all to come; None where nothing tells it yet.

        Args:
            done: Part of this stage that is done, 0 to 1.
            now: The present time.
        """
        elapsed = now - self._begun
        coming = sum(self._coming.values())
        if done >= 1 and not coming:
            return None
        if done >= _TELLING_SHARE:
            here = elapsed / done * (1 - done)
            known_time, known_share = self._past_time, self._past_share
            if self._share > 0:
                known_time, known_share = known_time + elapsed, known_share + self._share * done
        elif self._past_share > 0:
            known_time, known_share = self._past_time, self._past_share
            here = max(known_time / known_share * self._share - elapsed, 0.0)
        else:
            return None
        if not coming:
            return here
        return here + known_time / known_share * coming if known_share > 0 else None
