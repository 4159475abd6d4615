"""The KV cache: one buffer a layer for keys and one for values, shared by the model's past and present.

Layout [slots, num_key_value_heads, capacity, head_dim]. The address space is reserved once for the capacity of the
memory plan; the kernel commits pages as tokens are written, so resident memory grows in steps of a page (16 tokens at
head_dim 64) without copies, and ``release`` gives pages back. The buffers never move, so the model's bindings to them
stay valid for the life of the engine.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.errors import MemoryBudgetError
from lamplighter_agent.package.manifest import ModelFacts

CacheArray = NDArray[np.float32]

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape of a cache, all layers alike.

    Attributes:
        layers: Number of decoder layers.
        heads: ``num_key_value_heads``.
        head_dim: Features of a head.
    """

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def from_model(cls, model: ModelFacts) -> CacheSpec:
        """Return the spec of a manifest's model."""
        return cls(model.num_hidden_layers, model.num_key_value_heads, model.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one slot in float32, all layers."""
        return 2 * self.layers * self.heads * self.head_dim * 4


class KVCache:
    """Keys and values of all slots and layers, with the number of valid tokens (offset) of each slot.

    Args:
        spec: Shape.
        slots: Rows.
        capacity: Tokens that a slot may hold.

    Attributes:
        buffers: float32 arrays [slots, heads, capacity, head_dim]: key and value of layer 0, of 1, …

    Raises:
        MemoryBudgetError: If the system refuses the address space.
    """

    def __init__(self, spec: CacheSpec, *, slots: int, capacity: int) -> None:
        self.spec = spec
        self.slots = slots
        self.capacity = capacity
        self._offsets = [0] * slots
        shape = (slots, spec.heads, capacity, spec.head_dim)
        length = slots * spec.heads * capacity * spec.head_dim * 4
        try:
            self._maps = [mmap.mmap(-1, length, flags=_PRIVATE) for _ in range(2 * spec.layers)]
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
            np.frombuffer(region, dtype=np.float32).reshape(shape) for region in self._maps
        )

    def offset(self, slot: int) -> int:
        """Return the number of valid tokens of a slot."""
        return self._offsets[slot]

    @property
    def nbytes(self) -> int:
        """Bytes of the valid tokens of all slots."""
        return sum(self._offsets) * self.spec.bytes_per_token

    def advance(self, slot: int, tokens: int) -> None:
        """Record that the model wrote ``tokens`` tokens behind the offset.

        Raises:
            ValueError: If the slot would hold more than ``capacity`` tokens.
        """
        if self._offsets[slot] + tokens > self.capacity:
            raise ValueError(f"slot {slot}: {self._offsets[slot]} + {tokens} tokens exceed capacity {self.capacity}")
        self._offsets[slot] += tokens

    def trim(self, slot: int, tokens: int) -> int:
        """Forget the last ``tokens`` tokens of a slot; return how many there were to forget."""
        trimmed = min(tokens, self._offsets[slot])
        self._offsets[slot] -= trimmed
        return trimmed

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots' contents, so that the slots in use can stay side by side."""
        if first == second:
            return
        if self._offsets[first] < self._offsets[second]:
            first, second = second, first
        long, short = self._offsets[first], self._offsets[second]
        for buffer in self.buffers:
            kept = buffer[second, :, :short].copy()
            buffer[second, :, :long] = buffer[first, :, :long]
            buffer[first, :, :short] = kept
        self._offsets[first], self._offsets[second] = self._offsets[second], self._offsets[first]

    def release(self, slot: int) -> None:
        """Empty a slot and give its memory back to the system."""
        self._offsets[slot] = 0
        if sys.platform != "linux":
            return
        length = self.spec.heads * self.capacity * self.spec.head_dim * 4
        # Only whole pages inside the slot: a page shared with a neighbour stays.
        start = -(-slot * length // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (slot + 1) * length // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            for region in self._maps:
                region.madvise(mmap.MADV_DONTNEED, start, end - start)
