"""Which sequence has which slot of the cache, and how many of the plan's cache tokens are promised to it.

The slots in use are kept dense, those that decode first: ``0 … decoding-1`` decode together, the following ones are in
prefill. Lent slots are the last ones. The first free slot may still hold what its last request left: the next one gets
this slot, and if it begins alike, as a further turn of a conversation does, nothing need be copied.
"""

from __future__ import annotations

from typing import Final

from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.loans import Loans
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.sequence import Sequence

EXTENSION_TOKENS: Final = 256
"""Cache tokens that a request without ``max_tokens`` reserves at a time."""


class SlotTable:
    """The sequences in slots, in the order of their slots.

    Args:
        cache: The cache whose slots these are; contents move along with their sequences.
        plan: Slots and cache tokens to keep to.

    Attributes:
        loans: The slots that others have.
    """

    def __init__(self, cache: KVCache, plan: MemoryPlan) -> None:
        self.loans = Loans(plan)
        self._cache = cache
        self._plan = plan
        self._rows: list[Sequence] = []
        self._decoding = 0
        self._reserved = 0
        self._left_over = False

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._rows

    @property
    def all(self) -> list[Sequence]:
        """The sequences of all slots."""
        return list(self._rows)

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that decode, in slots 0, 1 and so on."""
        return self._rows[: self._decoding]

    @property
    def prefilling(self) -> list[Sequence]:
        """The sequences in prefill."""
        return self._rows[self._decoding :]

    def slot(self, sequence: Sequence) -> int:
        """Return a sequence's slot."""
        return self._rows.index(sequence)

    def admit(self, sequence: Sequence, tokens: int) -> int | None:
        """Give a sequence the next slot and ``tokens`` cache tokens, for all of its answers; None if that is not there.

        The slot may hold tokens of an earlier request, which the caller has to use or to forget. Slots and tokens of
        all answers are held from the start, so that ``begin_decoding`` cannot fail.
        """
        if self._held + sequence.width > self.loans.slots_left or self._reserved + tokens > self.loans.tokens_left:
            return None
        self._reserved += tokens
        sequence.reserved = tokens
        self._rows.append(sequence)
        self._left_over = False
        return len(self._rows) - 1

    def lend(self, tokens: int) -> int:
        """Lend a slot with room for ``tokens`` tokens and return it.

        Raises:
            RequestError: If there is none, or not that much room (429).
        """
        slot = self.loans.lend(tokens, slots_held=self._held, tokens_held=self._reserved)
        if slot == len(self._rows) or self._reserved + self.left_over_tokens > self.loans.tokens_left:
            self.forget_left_over()
        return slot

    def begin_decoding(self, sequence: Sequence) -> list[Sequence]:
        """Put a sequence whose prompt is computed among those that decode, with its other answers, or beams, behind it.

        Each of these gets a slot with a copy of the prompt. Returns them all.
        """
        self._join(sequence)
        if sequence.slots > 1:
            self.forget_left_over()
        source, others = self._decoding - 1, sequence.branches()
        share = sequence.reserved // (1 + len(others))
        sequence.reserved = share
        for other in others:
            other.reserved = share
            self._rows.append(other)
            self._cache.copy(source, len(self._rows) - 1, self._cache.offset(source))
            self._join(other)
        return [sequence, *others]

    def leave_decoding(self, sequence: Sequence) -> None:
        """Put a sequence that decodes back among those in prefill."""
        self._decoding -= 1
        self._exchange(self.slot(sequence), self._decoding)

    def extend(self, sequence: Sequence) -> bool:
        """Make sure that the next token's place is reserved; False if the plan has no room left."""
        if self._cache.offset(self.slot(sequence)) < sequence.reserved:
            return True
        most = min(len(sequence.prompt) + sequence.limit, self._plan.max_context_tokens)
        more = min(EXTENSION_TOKENS, most - sequence.reserved, self.loans.tokens_left - self._reserved)
        if more <= 0:
            return False
        sequence.reserved += more
        self._reserved += more
        if self._reserved + self.left_over_tokens > self.loans.tokens_left:
            self.forget_left_over()
        return True

    @property
    def left_over_tokens(self) -> int:
        """Tokens in the first free slot that an earlier request left."""
        return self._cache.offset(len(self._rows)) if self._left_over else 0

    def forget_left_over(self) -> None:
        """Empty the first free slot, if an earlier request left something there."""
        if self._left_over:
            self._cache.release(len(self._rows))
            self._left_over = False

    def remove(self, sequence: Sequence, *, leave: bool) -> None:
        """Take a sequence out of its slot, keep the others dense and give the cache's memory back.

        Args:
            sequence: The sequence.
            leave: Leave what a later prompt may begin with in the slot, if no other sequence has to move there.
        """
        self.forget_left_over()
        slot = self.slot(sequence)
        if leave and slot == len(self._rows) - 1:
            self._rows.pop()
            self._decoding = min(self._decoding, slot)
            self._reserved -= sequence.reserved
            self._cache.cut(slot, len(self._cache.prefix(slot)))
            self._left_over = True
            return
        self._cache.trim(slot, self._cache.capacity)
        if slot < self._decoding:
            self.leave_decoding(sequence)
            slot = self._decoding
        last = len(self._rows) - 1
        self._exchange(slot, last)
        self._rows.pop()
        self._cache.release(last)
        self._reserved -= sequence.reserved

    @property
    def _held(self) -> int:
        """Slots in use or promised."""
        return sum(sequence.slots for sequence in self._rows)

    def _join(self, sequence: Sequence) -> None:
        self._exchange(self.slot(sequence), self._decoding)
        self._decoding += 1

    def _exchange(self, first: int, second: int) -> None:
        if first != second:
            self._cache.swap(first, second)
            self._rows[first], self._rows[second] = self._rows[second], self._rows[first]
