"""Computes prefill chunks and batched decode steps: session and cache together, buffers allocated once.

The kernel takes several rows only for single-token steps, so a prompt is computed alone on its slot's row, and decode
runs on the slots 0 to batch-1, which the scheduler keeps dense.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.session import Binding, FloatArray, IntArray, ModelSession

_MASK_STEP_TOKENS: Final = 256
"""The bound attention mask is longer than needed by up to this, so that most steps only write one number into it."""


class ModelRunner:
    """Runs the model on a cache.

    Args:
        session: The open model.
        cache: The cache that it reads and writes; offsets are advanced here.
    """

    def __init__(self, session: ModelSession, cache: KVCache) -> None:
        self._session = session
        self.cache = cache
        self._width = session.io.logits_width
        self._prefill_bindings: dict[int, Binding] = {}
        self._decode_bindings: dict[int, Binding] = {}
        self._ones: IntArray = np.ones((1, cache.capacity), dtype=np.int64)
        self._positions: IntArray = np.arange(cache.capacity, dtype=np.int64).reshape(1, -1)
        self._decode_ids: IntArray = np.zeros((cache.slots, 1), dtype=np.int64)
        self._decode_positions: IntArray = np.zeros((cache.slots, 1), dtype=np.int64)
        self._decode_rope_tokens: IntArray = np.zeros(cache.slots, dtype=np.int64)
        self._decode_logits: FloatArray = np.empty((cache.slots, 1, self._width), dtype=np.float32)
        self._mask: IntArray = np.zeros((cache.slots, 0), dtype=np.int64)
        self._masked = [0] * cache.slots

    def prefill(self, slot: int, tokens: list[int]) -> FloatArray:
        """Append tokens to a slot.

        Args:
            slot: The row.
            tokens: At least one token id.

        Returns:
            float32 [logits width]: the logits behind the last token, an array of the caller's own.

        Raises:
            EngineError: If the runtime fails; the slot's offset is unchanged.
        """
        row: FloatArray = self._prefill(slot, tokens, len(tokens) - 1)[-1]
        return row

    def prefill_rows(self, slot: int, tokens: list[int]) -> FloatArray:
        """Append tokens to a slot, as ``prefill``, and return the logits behind each: float32 [tokens, logits width].

        Raises:
            EngineError: If the runtime fails; the slot's offset is unchanged.
        """
        return self._prefill(slot, tokens, 0)

    def _prefill(self, slot: int, tokens: list[int], start: int) -> FloatArray:
        """Append tokens and return at least the logits behind those from ``start`` on."""
        count, past = len(tokens), self.cache.offset(slot)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            rows = tuple(buffer[slot : slot + 1] for buffer in self.cache.buffers)
            binding = self._prefill_bindings[slot] = self._session.bind(rows)
        start = start if self._session.io.has_logits_start else 0
        logits: FloatArray = np.empty((1, count - start, self._width), dtype=np.float32)
        binding.set_inputs(
            np.array([tokens], dtype=np.int64),
            self._ones[:, : past + count],
            self._positions[:, past : past + count],
        )
        binding.set_rope_tokens(np.array([self.cache.rope_tokens(slot)], dtype=np.int64))
        binding.set_logits(logits, start=start)
        binding.run()
        self.cache.advance(slot, tokens)
        found: FloatArray = logits[0]
        return found

    def decode(self, tokens: list[int]) -> FloatArray:
        """Append one token to each of the slots 0 to len(tokens) - 1.

        Args:
            tokens: The token of each slot.

        Returns:
            float32 [len(tokens), logits width]: valid until the next call.

        Raises:
            EngineError: If the runtime fails; offsets are unchanged.
        """
        batch = len(tokens)
        longest = self._write_inputs(tokens)
        if longest > self._mask.shape[1]:
            self._widen_mask(longest)
        binding = self._decode_bindings.get(batch)
        if binding is None:
            binding = self._decode_bindings[batch] = self._bind_decode(batch)
        for slot in range(batch):
            self._mask_slot(slot, self.cache.offset(slot) + 1)
        binding.run()
        for slot, token_id in enumerate(tokens):
            self.cache.advance(slot, (token_id,))
        rows: FloatArray = self._decode_logits[:batch, 0]
        return rows

    def _write_inputs(self, tokens: list[int]) -> int:
        """Write ids and positions in place; return the tokens of the longest slot after this step."""
        longest = 0
        for slot, token_id in enumerate(tokens):
            offset = self.cache.offset(slot)
            self._decode_ids[slot, 0] = token_id
            self._decode_positions[slot, 0] = offset
            self._decode_rope_tokens[slot] = self.cache.rope_tokens(slot)
            longest = max(longest, offset + 1)
        return longest

    def _widen_mask(self, tokens: int) -> None:
        width = min(-(-tokens // _MASK_STEP_TOKENS) * _MASK_STEP_TOKENS, self.cache.capacity)
        self._mask = np.zeros((self.cache.slots, width), dtype=np.int64)
        self._masked = [0] * self.cache.slots
        # The old mask is still bound there.
        self._decode_bindings.clear()

    def _mask_slot(self, slot: int, tokens: int) -> None:
        """Make the slot's mask ``tokens`` ones: usually one more than in the step before."""
        masked = self._masked[slot]
        if masked < tokens:
            self._mask[slot, masked:tokens] = 1
        else:
            self._mask[slot, tokens:masked] = 0
        self._masked[slot] = tokens

    def _bind_decode(self, batch: int) -> Binding:
        binding = self._session.bind(tuple(buffer[:batch] for buffer in self.cache.buffers))
        binding.set_inputs(self._decode_ids[:batch], self._mask[:batch], self._decode_positions[:batch])
        binding.set_rope_tokens(self._decode_rope_tokens[:batch])
        binding.set_logits(self._decode_logits[:batch], start=0)
        return binding
