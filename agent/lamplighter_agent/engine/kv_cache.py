"""The KV cache: one buffer a layer for keys and one for values, shared by the model's past and present.

Layout [slots, num_key_value_heads, capacity, head_dim]. Beside the buffers the cache keeps the ids of the tokens of
each slot, so that whoever looks for a prefix need not know how they came there.

The address space is reserved once for the capacity of the memory plan; the kernel commits pages as tokens are written,
so resident memory grows in steps of a page (16 tokens at head_dim 64) without copies, and ``release`` gives pages back.
The buffers never move, so the model's bindings to them stay valid for the life of the engine.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.rotation import KeyRotation
from lamplighter_agent.engine.shared_pages import SharedPages
from lamplighter_agent.errors import MemoryBudgetError
from lamplighter_agent.package.manifest import CacheDtype, ModelFacts

CacheArray = NDArray[np.float32 | np.int8]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape of a cache, all layers alike.

    Attributes:
        layers: Number of decoder layers.
        heads: ``num_key_value_heads``.
        head_dim: Features of a head.
        dtype: Type of an element.
        short_rope_tokens: With LongRoPE, the longest text whose keys are made with the short factors; else None.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: CacheDtype = "float32"
    short_rope_tokens: int | None = None

    @classmethod
    def from_model(cls, model: ModelFacts, dtype: CacheDtype = "float32") -> CacheSpec:
        """Return the spec of a manifest's model."""
        short = None if model.rope is None else model.rope.original_max_position_embeddings
        return cls(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, dtype, short)

    @property
    def numpy_dtype(self) -> np.dtype[np.float32 | np.int8]:
        """The type of the buffers."""
        return np.dtype(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one slot, all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.numpy_dtype.itemsize


class KVCache:
    """Keys and values of all slots and layers, with the number of valid tokens (offset) of each slot.

    Args:
        spec: Shape.
        slots: Rows.
        capacity: Tokens that a slot may hold.
        rotations: How the keys of each layer move to other positions; None if they cannot.

    Attributes:
        buffers: Arrays [slots, heads, rows, head_dim], rows >= capacity: key and value of layer 0, of 1, …

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
        row_bytes = spec.heads * spec.head_dim * spec.numpy_dtype.itemsize
        # A slot is a whole number of pages, so that it can be given back and mirrored alone.
        rows = -(-capacity // _rows_in_pages(row_bytes)) * _rows_in_pages(row_bytes)
        self._shape = (spec.heads, rows, spec.head_dim)
        self._slot_bytes = row_bytes * rows
        length = slots * self._slot_bytes
        try:
            self._pages = SharedPages(2 * spec.layers * length)
            self._maps = [self._pages.map(index * length, length) for index in range(2 * spec.layers)]
        except (OSError, ValueError) as error:
            raise MemoryBudgetError(
                f"the system refused {2 * spec.layers * length} bytes of address space for the KV cache: {error}",
                hint="lower max_context_tokens or slots",
            ) from error
        if sys.platform == "linux":
            for region in self._maps:
                # Huge pages would commit 2 MiB for the first token of every head.
                region.madvise(mmap.MADV_NOHUGEPAGE)
        self.buffers: tuple[CacheArray, ...] = tuple(
            np.frombuffer(region, dtype=spec.numpy_dtype).reshape(slots, *self._shape) for region in self._maps
        )
        self._mirror_maps: list[mmap.mmap] = []

    def mirrors(self, rows: int) -> tuple[CacheArray, ...]:
        """Return arrays like ``buffers`` with ``rows`` rows, each of which is the memory of slot 0.

        A page that is reached through several rows counts as often in this process's resident size, but is there once.
        Call it once: the arrays stay valid for the life of the cache.

        Raises:
            OSError: If the system refuses the address space, or cannot map memory several times.
        """
        length = self.slots * self._slot_bytes
        self._mirror_maps = [
            self._pages.repeat(index * length, self._slot_bytes, rows) for index in range(len(self._maps))
        ]
        return tuple(
            np.frombuffer(region, dtype=self.spec.numpy_dtype).reshape(rows, *self._shape)
            for region in self._mirror_maps
        )

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
    def can_evict(self) -> bool:
        """True if ``evict`` can move the keys of this model."""
        return self._rotations is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the valid tokens of all slots."""
        return sum(map(len, self._tokens)) * self.spec.bytes_per_token

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

    def trim(self, slot: int, tokens: int) -> int:
        """Forget the last ``tokens`` tokens of a slot; return how many there were to forget."""
        held = self._tokens[slot]
        trimmed = min(tokens, len(held))
        del held[len(held) - trimmed :]
        slid_at = self._slid_at[slot]
        if slid_at is not None and len(held) <= slid_at:
            self._slid_at[slot] = None
        return trimmed

    def cut(self, slot: int, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of a slot alone and give the whole pages behind them back to the system."""
        self.trim(slot, max(self.offset(slot) - tokens, 0))
        if sys.platform != "linux":
            return
        heads, rows, head_dim = self._shape
        row_bytes = head_dim * self.spec.numpy_dtype.itemsize
        for head in range(heads):
            first = slot * self._slot_bytes + head * rows * row_bytes
            begin = -(-(first + self.offset(slot) * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + rows * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            for region in self._maps if end > begin else ():
                region.madvise(mmap.MADV_REMOVE, begin, end - begin)

    def evict(self, slot: int, keep: int, tokens: int) -> None:
        """Forget ``tokens`` tokens behind the first ``keep``; those behind them move up, keys turned to fit.

        Raises:
            ValueError: If the slot holds fewer, or the keys of this model cannot be moved.
        """
        end = self.offset(slot)
        if self._rotations is None:
            raise ValueError("the keys of this model cannot be moved to other positions")
        if keep + tokens > end:
            raise ValueError(f"slot {slot} holds {end} tokens, not {keep} + {tokens}")
        for index, buffer in enumerate(self.buffers):
            moved = buffer[slot, :, keep + tokens : end]
            if index % 2 == 0:
                moved = self._rotations[index // 2].shift(moved, -tokens)
            buffer[slot, :, keep : end - tokens] = moved
        del self._tokens[slot][keep : keep + tokens]
        slid_at = self._slid_at[slot]
        self._slid_at[slot] = keep if slid_at is None else min(keep, slid_at)

    def copy(self, source: int, target: int, tokens: int, *, start: int = 0) -> None:
        """Make ``target`` hold the first ``tokens`` tokens of ``source`` and nothing else.

        Args:
            source: Slot to copy from.
            target: Slot to copy to.
            tokens: Tokens to hold.
            start: Leading tokens that both hold already, of the same computation, and that need no copy.

        Raises:
            ValueError: If ``source`` holds fewer.
        """
        if tokens > self.offset(source):
            raise ValueError(f"slot {source} holds {self.offset(source)} tokens, not {tokens}")
        for buffer in self.buffers:
            buffer[target, :, start:tokens] = buffer[source, :, start:tokens]
        self._tokens[target] = self._tokens[source][:tokens]
        slid_at = self._slid_at[source]
        self._rope_tokens[target] = self._rope_tokens[source]
        self._slid_at[target] = None if slid_at is None or tokens <= slid_at else slid_at

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots' contents, so that the slots in use can stay side by side."""
        if first == second:
            return
        if self.offset(first) < self.offset(second):
            first, second = second, first
        long, short = self.offset(first), self.offset(second)
        for buffer in self.buffers:
            kept = buffer[second, :, :short].copy()
            buffer[second, :, :long] = buffer[first, :, :long]
            buffer[first, :, :short] = kept
        self._tokens[first], self._tokens[second] = self._tokens[second], self._tokens[first]
        self._slid_at[first], self._slid_at[second] = self._slid_at[second], self._slid_at[first]
        planned = self._rope_tokens
        planned[first], planned[second] = planned[second], planned[first]

    def release(self, slot: int) -> None:
        """Empty a slot and give its memory back to the system."""
        self._tokens[slot] = []
        self._slid_at[slot] = None
        self._rope_tokens[slot] = 0
        if sys.platform != "linux":
            return
        for region in self._maps:
            region.madvise(mmap.MADV_REMOVE, slot * self._slot_bytes, self._slot_bytes)


def _rows_in_pages(row_bytes: int) -> int:
    """Return the fewest rows of ``row_bytes`` bytes that fill whole pages."""
    return mmap.PAGESIZE // math.gcd(row_bytes, mmap.PAGESIZE)
