"""How requests use the prefix cache: what a prompt begins with is copied, what a request leaves behind is stored."""

from __future__ import annotations

from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.prefix_cache import PrefixCache, common_prefix
from lamplighter_agent.engine.sequence import Sequence


class PrefixUse:
    """The prefix cache and the slots' own contents, seen from a request.

    Args:
        cache: The slots.
        prefixes: What earlier requests left; None: prefixes are not used.
    """

    def __init__(self, cache: KVCache, prefixes: PrefixCache | None) -> None:
        self._cache = cache
        self._prefixes = prefixes

    def reuse(self, sequence: Sequence, slot: int) -> None:
        """Copy the longest beginning of the prompt that an earlier slot or the prefix cache holds into its slot.

        The last token is left, since its logits are needed, and the one before it, for ``chunk_length``'s reason.
        """
        if self._prefixes is None or not sequence.cache_prompt:
            return
        if self._cache.rope_tokens(slot):
            return  # kept prefixes have keys of the short factors
        wanted = sequence.prompt[:-2]
        shared = [(common_prefix(self._cache.prefix(other), wanted), other) for other in range(slot)]
        length, other = max(shared, default=(0, slot))
        if length > self._prefixes.recall(wanted, beyond=length):
            self._cache.copy(other, slot, length)
        else:
            length = self._prefixes.restore(self._cache, slot, wanted)
        sequence.prefilled = sequence.request.cached = length

    def keep(self, sequence: Sequence, slot: int) -> None:
        """Store what a sequence's slot holds for later prompts that begin with it."""
        if self._prefixes is not None and sequence.cache_prompt:
            self._prefixes.store(self._cache, slot, len(self._cache.prefix(slot)))
