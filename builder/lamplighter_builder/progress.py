"""How a long build tells where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Hears of stages and of work done in them."""

    def expect(self, shares: Mapping[str, float]) -> None:
        """Be told which stages will come, with their shares of the time in any unit."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of ``total`` units of work (bytes, tensors, tokens …)."""

    def advance(self, amount: int) -> None:
        """Report work done since the last call."""

    def warn(self, text: str) -> None:
        """Tell the user of something that goes on all the same."""


class SilentProgress:
    """Hears and says nothing."""

    def expect(self, shares: Mapping[str, float]) -> None:
        """Ignore what will come."""

    def stage(self, title: str, total: int) -> None:
        """Ignore the stage."""

    def advance(self, amount: int) -> None:
        """Ignore the work."""

    def warn(self, text: str) -> None:
        """Ignore the warning."""
