"""How a text goes on that its slot, or LongRoPE's short factors, cannot take any further."""

from __future__ import annotations

from typing import Final

from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.prefix_use import PrefixUse
from lamplighter_agent.engine.sequence import Sequence
from lamplighter_agent.engine.slots import SlotTable

_MOVED_SHARE: Final = 4
"""Part of the tokens that sliding forgets at once: moving the others is cheap …"""

_COMPUTED_SHARE: Final = 2
"""… and computing them again is not."""


class Overflow:
    """Makes room for sequences that decode, or sends them back to prefill.

    Args:
        cache: The slots.
        slots: Which sequence has which.
        prefixes: Where a text is kept before it is computed anew.
    """

    def __init__(self, cache: KVCache, slots: SlotTable, prefixes: PrefixUse) -> None:
        self._cache = cache
        self._slots = slots
        self._prefixes = prefixes

    def slide(self, sequence: Sequence) -> bool:
        """Forget tokens behind the kept ones to make room for more; False if the request does not want that.

        Where the keys of the model cannot be moved, what is left is computed again as a prompt is, chunk by chunk.
        """
        if not sequence.slides:
            return False
        cache, slot = self._cache, self._slots.slot(sequence)
        tokens, keep = cache.tokens(slot), min(sequence.keep, cache.offset(slot) // 2)
        if gap := cache.evictable(slot, keep, max((len(tokens) - keep) // _MOVED_SHARE, 1)):
            cache.evict(slot, keep, gap)
            return True
        recent = tokens[keep + max((len(tokens) - keep) // _COMPUTED_SHARE, 1) :]
        cache.trim(slot, len(tokens) - keep)
        self._compute_again(sequence, [*tokens[:keep], *recent, sequence.last_token], cache.offset(slot))
        return True

    def take_long_factors(self, sequence: Sequence) -> None:
        """Where LongRoPE's short factors end, compute the text again with the long ones, as transformers does."""
        cache, slot = self._cache, self._slots.slot(sequence)
        if not cache.needs_long_rope(slot):
            return
        tokens = cache.tokens(slot)
        self._prefixes.keep(sequence, slot)
        cache.trim(slot, len(tokens))
        cache.plan(slot, len(tokens) + 1)
        self._compute_again(sequence, [*tokens, sequence.last_token], 0)

    def _compute_again(self, sequence: Sequence, tokens: list[int], done: int) -> None:
        """Send a sequence back to prefill; the first ``done`` of ``tokens`` are in its slot."""
        sequence.compute_again(tokens, done)
        self._slots.leave_decoding(sequence)
