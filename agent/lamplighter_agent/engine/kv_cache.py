"""The KV cache: one buffer a layer for keys and one for values, shared by the model's past and present.

Layout [slots, num_key_value_heads, capacity, head_dim]. Beside the buffers the cache keeps the ids of the tokens of
each slot, so that whoever looks for a prefix need not know how they came there. Buffers of windowed layers may be
smaller than the context (``windows``): they hold a slot's latest tokens, at places that follow from the number of
tokens alone, and whoever wants to go back further than they reach must compute again.

The address space is reserved once for the capacity of the memory plan; the kernel commits pages as tokens are written,
so resident memory grows in steps of a page (16 tokens at head_dim 64) without copies, and ``release`` gives pages back.
The buffers never move, so the model's bindings to them stay valid for the life of the engine.
"""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.rotation import KeyRotation
from lamplighter_agent.engine.shared_pages import SharedPages
from lamplighter_agent.errors import MemoryBudgetError

CacheArray = NDArray[np.float32 | np.int8]


class KVCache:
    """Keys and values of all slots and layers, with the number of valid tokens (offset) of each slot.

    Args:
        spec: Shape.
        slots: Rows.
        capacity: Tokens that a slot may hold.
        rotations: How the keys of each layer move to other positions; None if they cannot.

    Attributes:
        buffers: Arrays [slots, heads, rows, head_dim], key and value of layer 0, of 1, …; rows >= capacity, or >= that
            of the windowed layers.

    Raises:
        MemoryBudgetError: If the system refuses the address space.
    """

    def __init__(
        self, spec: CacheSpec, *, slots: int, capacity: int, rotations: tuple[KeyRotation, ...] | None = None
    ) -> None:
        self.spec = spec
        self.slots = slots
        self.capacity = capacity
        self._rotations = rotations
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._slid_at: list[int | None] = [None] * slots
        self._rope_tokens = [0] * slots
        self._touched = [0] * slots  # most tokens since pages of the slot were given back
        windowed = () if spec.windowed is None else spec.windowed.layers
        if spec.windowed is not None and spec.windowed.capacity != spec.rows(spec.windowed.capacity):
            # The kernel takes the rows that there are for the capacity.
            raise ValueError(f"{spec.windowed.capacity} rows of windowed layers are no whole pages")
        self._windowed = tuple(index // 2 in windowed for index in range(2 * spec.layers))
        self._shapes = [
            (
                spec.heads,
                spec.windowed.capacity if spec.windowed is not None and small else spec.rows(capacity),
                spec.head_dim,
            )
            for small in self._windowed
        ]
        self._slot_bytes = [spec.row_bytes * rows for _, rows, _ in self._shapes]
        self._begins = [slots * begin for begin in itertools.accumulate(self._slot_bytes, initial=0)]
        try:
            self._pages = SharedPages(self._begins[-1])
            self._maps = [
                self._pages.map(begin, slots * size)
                for begin, size in zip(self._begins, self._slot_bytes, strict=False)
            ]
        except (OSError, ValueError) as error:
            raise MemoryBudgetError(
                f"the system refused {self._begins[-1]} bytes of address space for the KV cache: {error}",
                hint="lower max_context_tokens or slots",
            ) from error
        if sys.platform == "linux":
            for region in self._maps:
                # Huge pages would commit 2 MiB for the first token of every head.
                region.madvise(mmap.MADV_NOHUGEPAGE)
        self.buffers: tuple[CacheArray, ...] = tuple(
            np.frombuffer(region, dtype=spec.dtype).reshape(slots, *shape)
            for region, shape in zip(self._maps, self._shapes, strict=True)
        )
        self._mirror_maps: list[mmap.mmap] = []

    def mirrors(self, rows: int) -> tuple[CacheArray, ...]:
        """Return arrays like ``buffers`` with ``rows`` rows, each of which is the memory of slot 0.

        A page that is reached through several rows counts as often in this process's resident size, but is there once;
        see ``unmap_mirrors``. Call it once: the arrays stay valid for the life of the cache.

        Raises:
            OSError: If the system refuses the address space, or cannot map memory several times.
        """
        self._mirror_maps = [
            self._pages.repeat(begin, size, rows) for begin, size in zip(self._begins, self._slot_bytes, strict=False)
        ]
        return tuple(
            np.frombuffer(region, dtype=self.spec.dtype).reshape(rows, *shape)
            for region, shape in zip(self._mirror_maps, self._shapes, strict=True)
        )

    def unmap_mirrors(self) -> None:
        """Let the pages that were reached through ``mirrors`` count once again, until they are used the next time."""
        for region in self._mirror_maps:
            region.madvise(mmap.MADV_DONTNEED)

    def resident(self, index: int, slot: int, begin: int, end: int) -> tuple[CacheArray, int]:
        """Return where a buffer has a slot's tokens of the positions ``begin`` to ``end``.

        Args:
            index: Which of ``buffers``.
            slot: The row.
            begin: First position.
            end: Position behind the last one, from the number of valid tokens to that of rows behind it.

        Returns:
            [heads, n, head_dim] and the position of the first of these n tokens: ``begin``, or later if a windowed
            layer has dropped it.
        """
        first = self._first(index, self.offset(slot))
        begin = min(max(begin, first), end)
        return self.buffers[index][slot, :, begin - first : end - first], begin

    def steady(self, slot: int) -> int:
        """Return how many more tokens a slot takes before windowed layers drop some."""
        windowed = self.spec.windowed
        return self.capacity if windowed is None else windowed.capacity - windowed.resident(self.offset(slot))

    def stretch(self, slot: int) -> int:
        """Return how many tokens a chunk may have that ends where windowed layers drop some next."""
        windowed = self.spec.windowed
        return self.capacity if windowed is None else self.steady(slot) or windowed.step

    def reusable(self, slot: int, tokens: int) -> int:
        """Return with how many of a slot's leading ``tokens`` tokens another text can begin: all, or none."""
        windowed, held = self.spec.windowed, self.offset(slot)
        return tokens if windowed is None or windowed.first(held) <= windowed.first(tokens) else 0

    def offset(self, slot: int) -> int:
        """Return the number of valid tokens of a slot."""
        return len(self._tokens[slot])

    def tokens(self, slot: int) -> tuple[int, ...]:
        """Return the ids of a slot's valid tokens."""
        return tuple(self._tokens[slot])

    def prefix(self, slot: int) -> tuple[int, ...]:
        """Return the ids of the leading tokens whose keys and values are what a prompt of them would give.

        All of them, until ``evict`` has closed a gap: what follows it still knows of the tokens that went. None if the
        row has long factors: most prompts that begin with these tokens have short ones.
        """
        if self._rope_tokens[slot]:
            return ()
        return tuple(self._tokens[slot][: self._slid_at[slot]])

    def plan(self, slot: int, tokens: int) -> None:
        """Say of an empty slot how many tokens are to be put into it: with LongRoPE this chooses the factors."""
        short = self.spec.short_rope_tokens
        self._rope_tokens[slot] = tokens if short is not None and tokens > short else 0

    def rope_tokens(self, slot: int) -> int:
        """Return what the graph input ``rope_tokens`` must be for a slot: 0 for short factors and without LongRoPE."""
        return self._rope_tokens[slot]

    def room(self, slot: int) -> int:
        """Return how many more tokens a slot takes; with LongRoPE, before it needs the long factors."""
        short = self.spec.short_rope_tokens
        most = self.capacity if short is None or self._rope_tokens[slot] else min(short, self.capacity)
        return most - self.offset(slot)

    def needs_long_rope(self, slot: int) -> bool:
        """Return True if the next token's key would need the long factors, but the slot has short ones."""
        return self.spec.short_rope_tokens is not None and not self._rope_tokens[slot] and self.room(slot) <= 0

    @property
    def nbytes(self) -> int:
        """Bytes of the valid tokens of all slots."""
        return sum(self.spec.slot_bytes(len(tokens)) for tokens in self._tokens)

    def advance(self, slot: int, tokens: Iterable[int]) -> None:
        """Record that the model wrote these tokens behind the offset.

        Raises:
            ValueError: If the slot would hold more than ``capacity`` tokens.
        """
        added = list(tokens)
        held = self._tokens[slot]
        if len(held) + len(added) > self.capacity:
            raise ValueError(f"slot {slot}: {len(held)} + {len(added)} tokens exceed capacity {self.capacity}")
        held += added
        self.touch(slot, len(held))

    def touch(self, slot: int, tokens: int) -> None:
        """Say that the model is about to write a slot's first ``tokens`` tokens, whether it comes to its end or not."""
        self._touched[slot] = max(self._touched[slot], tokens)

    def trim(self, slot: int, tokens: int) -> int:
        """Forget the last ``tokens`` tokens of a slot; return how many were forgotten.

        These are all of them where a windowed layer has dropped what the others would need.
        """
        held = self._tokens[slot]
        left = self.reusable(slot, max(len(held) - tokens, 0))
        trimmed = len(held) - left
        del held[left:]
        slid_at = self._slid_at[slot]
        if slid_at is not None and left <= slid_at:
            self._slid_at[slot] = None
        return trimmed

    def cut(self, slot: int, tokens: int, *, coming: int = 0) -> None:
        """Keep the first ``tokens`` tokens of a slot alone and give the whole pages behind them back to the system.

        Those stay that ``coming`` more tokens will fill.
        """
        self.trim(slot, max(self.offset(slot) - tokens, 0))
        if sys.platform != "linux":
            return
        row_bytes = self.spec.head_dim * self.spec.element_bytes
        touched, kept = self._touched[slot], self.offset(slot) + coming
        self._touched[slot] = max(min(touched, kept), self.offset(slot))
        for index, (region, (heads, rows, _)) in enumerate(zip(self._maps, self._shapes, strict=True)):
            used = min(kept - self._first(index, self.offset(slot)), rows)
            written = rows if self._windowed[index] else min(touched, rows)
            for head in range(slot * heads, (slot + 1) * heads):
                begin = -(-((head * rows + used) * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
                end = -(-((head * rows + written) * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
                end = min(end, (head + 1) * rows * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE)
                if end > begin:
                    region.madvise(mmap.MADV_REMOVE, begin, end - begin)

    def evictable(self, slot: int, keep: int, tokens: int) -> int:
        """Return how many tokens ``evict`` can forget behind the first ``keep``: about ``tokens``, or 0 if it cannot.

        Windowed layers drop whole steps, and what they keep must lie behind the gap.
        """
        if self._rotations is None:
            return 0
        windowed = self.spec.windowed
        if windowed is None:
            return tokens
        behind = windowed.first(self.offset(slot)) - keep
        return min(-(-tokens // windowed.step), max(behind // windowed.step, 0)) * windowed.step

    def evict(self, slot: int, keep: int, tokens: int) -> None:
        """Forget ``tokens`` tokens behind the first ``keep``; those behind them move up, keys turned to fit.

        Raises:
            ValueError: If the slot holds fewer, or the keys of this model cannot be moved so far (``evictable``).
        """
        end = self.offset(slot)
        if self._rotations is None:
            raise ValueError("the keys of this model cannot be moved to other positions")
        if keep + tokens > end:
            raise ValueError(f"slot {slot} holds {end} tokens, not {keep} + {tokens}")
        if self.spec.windowed is not None and self.evictable(slot, keep, tokens) != tokens:
            raise ValueError(f"slot {slot}: windowed layers cannot forget {tokens} tokens behind {keep}")
        for index, buffer in enumerate(self.buffers):
            moved, _ = self.resident(index, slot, keep + tokens, end)
            if index % 2 == 0:
                moved = self._rotations[index // 2].shift(moved, -tokens)
            # The gap is before all tokens of a windowed layer, which stay in their rows.
            begin = 0 if self._windowed[index] else keep
            buffer[slot, :, begin : begin + moved.shape[1]] = moved
        del self._tokens[slot][keep : keep + tokens]
        slid_at = self._slid_at[slot]
        self._slid_at[slot] = keep if slid_at is None else min(keep, slid_at)

    def copy(self, source: int, target: int, tokens: int, *, start: int = 0) -> None:
        """Make ``target`` hold the first ``tokens`` tokens of ``source`` and nothing else.

        Args:
            source: Slot to copy from.
            target: Slot to copy to.
            tokens: Tokens to hold, as many as are ``reusable``.
            start: Leading tokens that both hold already, of the same computation, and that need no copy.

        Raises:
            ValueError: If ``source`` holds fewer, or has dropped some that are needed.
        """
        if tokens > self.offset(source):
            raise ValueError(f"slot {source} holds {self.offset(source)} tokens, not {tokens}")
        if self.reusable(source, tokens) != tokens:
            raise ValueError(f"slot {source} has dropped what windowed layers need of its first {tokens} tokens")
        for index, buffer in enumerate(self.buffers):
            first = self._first(index, tokens)
            begin = 0 if self._windowed[index] else start
            buffer[target, :, begin : tokens - first] = buffer[source, :, begin : tokens - first]
        self._tokens[target] = self._tokens[source][:tokens]
        self.touch(target, tokens)
        slid_at = self._slid_at[source]
        self._rope_tokens[target] = self._rope_tokens[source]
        self._slid_at[target] = None if slid_at is None or tokens <= slid_at else slid_at

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots' contents, so that the slots in use can stay side by side."""
        if first == second:
            return
        for index, buffer in enumerate(self.buffers):
            rows = [held - self._first(index, held) for held in (self.offset(first), self.offset(second))]
            long, short = (first, second) if rows[0] >= rows[1] else (second, first)
            kept = buffer[short, :, : min(rows)].copy()
            buffer[short, :, : max(rows)] = buffer[long, :, : max(rows)]
            buffer[long, :, : min(rows)] = kept
        self._tokens[first], self._tokens[second] = self._tokens[second], self._tokens[first]
        self._touched[first] = self._touched[second] = max(self._touched[first], self._touched[second])
        self._slid_at[first], self._slid_at[second] = self._slid_at[second], self._slid_at[first]
        planned = self._rope_tokens
        planned[first], planned[second] = planned[second], planned[first]

    def release(self, slot: int) -> None:
        """Empty a slot and give its memory back to the system."""
        self._tokens[slot] = []
        self._slid_at[slot] = None
        self._rope_tokens[slot] = 0
        self._touched[slot] = 0
        if sys.platform != "linux":
            return
        for region, size in zip(self._maps, self._slot_bytes, strict=True):
            region.madvise(mmap.MADV_REMOVE, slot * size, size)

    def _first(self, index: int, tokens: int) -> int:
        """Return the position of the token that a buffer has in row 0 when a slot holds ``tokens``."""
        windowed = self.spec.windowed
        return windowed.first(tokens) if windowed is not None and self._windowed[index] else 0
