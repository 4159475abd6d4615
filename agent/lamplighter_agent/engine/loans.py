"""Cache slots that the scheduler lends to live sequences: the last ones, so that its own stay dense."""

from __future__ import annotations

from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.errors import RequestError


class Loans:
    """Who has which of the plan's slots besides the scheduler.

    Args:
        plan: Slots and cache tokens.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        self._lent: dict[int, int] = {}

    @property
    def slots_left(self) -> int:
        """The scheduler's own slots are 0 to this, exclusive."""
        return min(self._lent, default=self._plan.slots)

    @property
    def tokens_left(self) -> int:
        """Cache tokens that are not lent."""
        return self._plan.kv_tokens - sum(self._lent.values())

    def lend(self, tokens: int, *, slots_held: int, tokens_held: int) -> int:
        """Lend a slot.

        Args:
            tokens: Cache tokens that go with it.
            slots_held: The scheduler's slots in use or promised.
            tokens_held: Cache tokens in use or promised.

        Returns:
            The slot.

        Raises:
            RequestError: If there is none left, or not as many tokens (429).
        """
        slot = max((slot for slot in range(self._plan.slots) if slot not in self._lent), default=-1)
        if slot < slots_held:
            raise RequestError(
                f"all {self._plan.slots} slots of the memory plan are in use",
                code=429,
                param="max_context_tokens",
                hint="close a live sequence, wait for a request to end, or configure more slots",
            )
        if tokens > self.tokens_left - tokens_held:
            raise RequestError(
                f"{tokens} cache tokens are asked for, but {max(self.tokens_left - tokens_held, 0)} are left",
                code=429,
                param="max_context_tokens",
                hint="ask for fewer, or wait for a request to end",
            )
        self._lent[slot] = tokens
        return slot

    def take_back(self, slot: int) -> None:
        """End a loan."""
        del self._lent[slot]
