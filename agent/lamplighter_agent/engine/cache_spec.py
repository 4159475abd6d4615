"""Shape and sizes of a KV cache. Without numpy: the agent's main process plans memory with it and holds no array."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace
from typing import Final

from lamplighter_agent.engine.windows import WindowedLayers
from lamplighter_agent.package.manifest import CacheDtype, ModelFacts

ELEMENT_BYTES: Final[dict[CacheDtype, int]] = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape of a cache.

    Attributes:
        layers: Number of decoder layers.
        heads: ``num_key_value_heads``.
        head_dim: Features of a head.
        dtype: Type of an element.
        short_rope_tokens: With LongRoPE, the longest text whose keys are made with the short factors; else None.
        windowed: Layers whose buffers are smaller than the context; None if there are none.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: CacheDtype = "float32"
    short_rope_tokens: int | None = None
    windowed: WindowedLayers | None = None

    @classmethod
    def from_model(
        cls, model: ModelFacts, dtype: CacheDtype = "float32", windowed: WindowedLayers | None = None
    ) -> CacheSpec:
        """Return the spec of a manifest's model; windowed layers get buffers of whole pages."""
        short = None if model.rope is None else model.rope.original_max_position_embeddings
        spec = cls(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, dtype, short)
        if windowed is None:
            return spec
        return replace(spec, windowed=replace(windowed, capacity=spec.rows(windowed.capacity)))

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one slot, all layers."""
        return self.layers * self._layer_bytes

    def slot_bytes(self, tokens: int) -> int:
        """Return the bytes of a slot with ``tokens`` tokens."""
        if self.windowed is None:
            return tokens * self.bytes_per_token
        windowed = len(self.windowed.layers)
        held = (self.layers - windowed) * tokens + windowed * self.windowed.resident(tokens)
        return held * self._layer_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one slot in one buffer."""
        return self.heads * self.head_dim * self.element_bytes

    def rows(self, tokens: int) -> int:
        """Return how many rows a buffer has for ``tokens`` tokens: a slot is a whole number of pages.

        So it can be given back and mirrored alone.
        """
        step = mmap.PAGESIZE // math.gcd(self.row_bytes, mmap.PAGESIZE)
        return -(-tokens // step) * step

    @property
    def _layer_bytes(self) -> int:
        return 2 * self.row_bytes
