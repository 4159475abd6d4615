"""Slots of the cache that live sequences compute in by themselves, beside the scheduler's requests."""

from __future__ import annotations

from functools import partial

from lamplighter_agent.engine.computing import Runner, prompt_logits
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.sequence import chunk_length
from lamplighter_agent.engine.slots import SlotTable
from lamplighter_agent.engine.truncation import Logits


class Lender:
    """Lends slots and computes in them.

    Args:
        runner: Computes.
        slots: Knows which slots are free.
        chunk_tokens: Prompt tokens computed at once.
    """

    def __init__(self, runner: Runner, slots: SlotTable, *, chunk_tokens: int) -> None:
        self._runner = runner
        self._slots = slots
        self._chunk_tokens = chunk_tokens

    @property
    def cache(self) -> KVCache:
        """The cache whose slots are lent."""
        return self._runner.cache

    def lend(self, tokens: int) -> int:
        """Lend a slot with room for ``tokens`` tokens.

        Raises:
            RequestError: If there is none, or not that much room (429).
        """
        slot = self._slots.lend(tokens)
        self.cache.plan(slot, tokens)
        return slot

    def compute(self, slot: int, tokens: list[int]) -> Logits:
        """Compute what a lent slot lacks of ``tokens``; return the logits behind the last one.

        Raises:
            EngineError: If the model fails; what was computed stays.
        """
        logits: Logits | None = None
        while (done := self.cache.offset(slot)) < len(tokens):
            length = chunk_length(len(tokens) - done, self._chunk_tokens, self._runner.cache.stretch(slot))
            # The first piece may be a token that this text drew, which decode steps compute alone.
            compute = self._runner.prefill if logits is None else partial(prompt_logits, self._runner)
            logits = compute(slot, tokens[done : done + length])
        assert logits is not None, "the slot holds the last token, whose logits are wanted"
        return logits

    def take_back(self, slot: int) -> None:
        """End a loan and empty the slot."""
        self._slots.loans.take_back(slot)
        self.cache.release(slot)
