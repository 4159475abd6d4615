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
        """Make a sequence's slot hold the longest beginning of the prompt that is known, and nothing else.

        It may be there from the slot's last request, or is copied from an earlier slot or the prefix cache. The last
        token is left, since its logits are needed, and the one before it, for ``chunk_length``'s reason.
        """
        length = self._reuse(sequence, slot)
        if self._cache.stretch(slot) == 1 and length:
            length -= 1  # so that no single token is computed up to where windowed layers drop some
        self._cache.cut(slot, length, coming=len(sequence.prompt) - length)
        sequence.prefilled = sequence.request.cached = length

    def _reuse(self, sequence: Sequence, slot: int) -> int:
        if self._prefixes is None or not sequence.cache_prompt:
            return 0
        if self._cache.rope_tokens(slot):
            return 0  # kept prefixes have keys of the short factors
        wanted = sequence.prompt[:-2]
        # Of equals the slot itself, where nothing is copied.
        cache = self._cache
        length, source = max(
            (cache.reusable(one, common_prefix(cache.prefix(one), wanted)), one) for one in range(slot + 1)
        )
        if self._prefixes.recall(wanted, beyond=length) > length:
            return self._prefixes.restore(self._cache, slot, wanted, held=length if source == slot else 0)
        if source != slot:
            self._cache.copy(source, slot, length)
        return length

    def keep(self, sequence: Sequence, slot: int) -> bool:
        """Store what a sequence's slot holds for later prompts that begin with it; return if there may be any.

        The keys of generated tokens come from decode steps, whose last bits are not those of a prefill: a further turn
        of a conversation goes on from what the model itself has seen. A prompt of one token is left out, since its
        first key would be such a one for everybody.
        """
        if self._prefixes is None or not self._may_keep(sequence):
            return False
        self._prefixes.store(self._cache, slot, len(self._cache.prefix(slot)))
        return self._prefixes.max_bytes > 0

    def keep_before_loss(self, sequence: Sequence, slot: int, coming: int) -> None:
        """Store what ``coming`` more tokens in a sequence's slot would make windowed layers drop."""
        if self._prefixes is not None and self._may_keep(sequence):
            self._prefixes.store_before_loss(self._cache, slot, coming)

    @staticmethod
    def _may_keep(sequence: Sequence) -> bool:
        return sequence.cache_prompt and len(sequence.prompt) > 1
