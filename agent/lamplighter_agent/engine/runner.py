"""Computes prefill chunks, batched decode steps and drafts: session and cache together, buffers allocated once.

The kernel takes several rows only for single-token steps, so a prompt is computed alone on its slot's row, and decode
runs on the slots 0 to batch-1, which the scheduler keeps dense.

A draft is verified as a decode step too: its tokens are rows of a batch whose caches are one and the same memory, slot
0. The attention kernel writes the keys and values of all rows before it reads any, so each row sees those before it.
Every row then goes through the kernels of a plain decode step, which the kernels for several tokens of one prompt do
not match: their attention sums in another order, and the projections' 8-bit activations turn that last bit into tenths
of a logit. What the order rests on is not taken on trust: see ``ModelRunner.verify``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lamplighter_agent.engine.kv_cache import CacheArray, KVCache
from lamplighter_agent.engine.session import Binding, FloatArray, IntArray, ModelSession
from lamplighter_agent.engine.speculation import MAX_ROWS
from lamplighter_agent.errors import EngineError
from lamplighter_agent.package.manifest import CacheDtype

logger = logging.getLogger(__name__)

_MASK_STEP_TOKENS: Final = 256
"""The bound attention mask is longer than needed by up to this, so that most steps only write one number into it."""

_SHORT_CONTEXT_BITS: Final = 9
"""Contexts of fewer than 512 tokens count as one case."""

_POISON: Final[Mapping[CacheDtype, tuple[float, ...]]] = {"float32": (math.nan,), "int8": (127, -128)}
"""What the places of a draft's tokens are filled with before they are written. Integers have no value that shows by
itself when it is read, but two of them cannot both be the right one."""


class ModelRunner:
    """Runs the model on a cache.

    Args:
        session: The open model.
        cache: The cache that it reads and writes; offsets are advanced here.
        prompts: The same model as it computes several tokens of a prompt fastest (``prompt_graph``); None: ``session``.
            Every piece of a prompt but a single token goes through it, so that it does not matter how one was cut.
    """

    def __init__(self, session: ModelSession, cache: KVCache, prompts: ModelSession | None = None) -> None:
        self._session = session
        self._prompts = session if prompts is None else prompts
        self.cache = cache
        self._prefill_bindings: dict[tuple[int, bool], Binding] = {}
        self._ones: IntArray = np.ones((1, cache.capacity), dtype=np.int64)
        self._positions: IntArray = np.arange(cache.capacity, dtype=np.int64).reshape(1, -1)
        self._decode = _Step(session, cache.buffers, cache.capacity)
        self._draft: _Step | None = None
        self._exact: dict[tuple[int, int], bool] = {}
        # On codes a row that is read too early does not show in every step, so the kernel's order must be known.
        self._differs = not session.writes_first
        self._poisons = _POISON[cache.spec.dtype]

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

    @property
    def hidden_size(self) -> int | None:
        """Features of a hidden state; None if the graph does not give them."""
        return self._session.io.hidden_size

    def hidden_states(self, slot: int, tokens: list[int]) -> FloatArray:
        """Append tokens to a slot, as ``prefill``, and return their last hidden states: float32 [tokens, hidden_size].

        Raises:
            EngineError: If the runtime fails; the slot's offset is unchanged.
        """
        assert self.hidden_size is not None
        hidden: FloatArray = np.empty((1, len(tokens), self.hidden_size), dtype=np.float32)
        # A binding of its own: an output cannot be unbound again.
        binding = self._bind_slot(slot, tokens)
        binding.set_hidden_states(hidden)
        self._run_prefill(binding, slot, tokens, len(tokens) - 1)
        rows: FloatArray = hidden[0]
        return rows

    @property
    def unpacks(self) -> bool:
        """True if prompts on an int8 cache are computed from unpacked keys and values."""
        return self._prompts.unpacks

    def _prefill(self, slot: int, tokens: list[int], start: int) -> FloatArray:
        """Append tokens and return at least the logits behind those from ``start`` on."""
        case = slot, len(tokens) > 1
        binding = self._prefill_bindings.get(case)
        if binding is None:
            binding = self._prefill_bindings[case] = self._bind_slot(slot, tokens)
        return self._run_prefill(binding, slot, tokens, start)

    def _bind_slot(self, slot: int, tokens: list[int]) -> Binding:
        session = self._prompts if len(tokens) > 1 else self._session
        return session.bind(tuple(buffer[slot : slot + 1] for buffer in self.cache.buffers))

    def _run_prefill(self, binding: Binding, slot: int, tokens: list[int], start: int) -> FloatArray:
        count, past = len(tokens), self.cache.offset(slot)
        start = start if self._session.io.has_logits_start else 0
        logits: FloatArray = np.empty((1, count - start, self._session.io.logits_width), dtype=np.float32)
        binding.set_inputs(
            np.array([tokens], dtype=np.int64),
            self._ones[:, : past + count],
            self._positions[:, past : past + count],
        )
        binding.set_rope_tokens(np.array([self.cache.rope_tokens(slot)], dtype=np.int64))
        binding.set_logits(logits, start=start)
        if count > 1 and self.unpacks:
            binding.set_piece(past, count)
        self.cache.touch(slot, past + count)
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
        slots = range(len(tokens))
        logits = self._decode.run(
            tokens, [self.cache.offset(slot) for slot in slots], [self.cache.rope_tokens(slot) for slot in slots]
        )
        for slot, token in enumerate(tokens):
            self.cache.advance(slot, (token,))
        return logits

    @property
    def decode_s(self) -> float:
        """Seconds that decode steps have spent in the model so far."""
        return self._decode.seconds

    def exactness(self, rows: int) -> bool | None:
        """Return whether ``verify`` gives the bits of ``decode`` at this number of rows; None if not yet known.

        Kernels may work otherwise in longer contexts, so each doubling of the context is a case of its own. One case
        that differs settles all: it is a matter of the machine.
        """
        return False if self._differs else self._exact.get(self._case(rows))

    def verify(self, tokens: list[int]) -> FloatArray:
        """Append tokens to slot 0, all in one step, with the result of as many decode steps, bit for bit.

        The first step of each case (``exactness``) is compared with decode steps, which then give the answer. Before a
        step, the places that its rows are to fill are poisoned. With float32 a row that was read before it was written
        shows as NaN, in every step. With int8 the first step of a case is run with two poisons, and must give the right
        bits both times. Once bits differ, decode steps give the answer from then on.

        Args:
            tokens: 2 to ``MAX_ROWS`` token ids.

        Returns:
            float32 [len(tokens), logits width]: the logits behind each token; valid until the next call.

        Raises:
            EngineError: If the runtime fails; the offset is unchanged.
        """
        case, known = self._case(len(tokens)), self.exactness(len(tokens))
        if known is False or len(tokens) > self.cache.steady(0):
            return self._singly(tokens)  # where windowed layers drop tokens, rows would move rows that others read
        if known:
            logits = self._run_draft(tokens, self._poisons[0])
            if logits is not None:
                self.cache.advance(0, tokens)
                return logits
        drafts = [] if known else [self._run_draft(tokens, poison, keep=True) for poison in self._poisons]
        singles = self._singly(tokens)
        self._exact[case] = bool(drafts) and all(
            logits is not None and np.array_equal(logits, singles) for logits in drafts
        )
        if not self._exact[case]:
            self._differs = True
            logger.warning("no speculation: on this machine %d rows do not have the bits of plain steps", len(tokens))
        return singles

    def _case(self, rows: int) -> tuple[int, int]:
        return rows, max((self.cache.offset(0) + rows).bit_length(), _SHORT_CONTEXT_BITS)

    def _run_draft(self, tokens: list[int], poison: float, *, keep: bool = False) -> FloatArray | None:
        """Run the step; None if it cannot be had here, or a row was read before it was written.

        The result is valid until the next call, or with ``keep`` a copy.
        """
        past, rows = self.cache.offset(0), len(tokens)
        if self._draft is None:
            try:
                mirrors = self.cache.mirrors(MAX_ROWS)
            except OSError as error:
                logger.warning("no speculation: the cache's memory cannot be mapped several times: %s", error)
                return None
            self._draft = _Step(self._session, mirrors, self.cache.capacity)
        self.cache.touch(0, past + rows)
        for index in range(len(self.cache.buffers)):
            poisoned, _ = self.cache.resident(index, 0, past, past + rows)
            poisoned[:] = poison
        logits = self._draft.run(tokens, range(past, past + rows), [self.cache.rope_tokens(0)] * rows)
        if not np.isfinite(logits[:, 0]).all():
            return None
        return logits.copy() if keep else logits

    def _singly(self, tokens: list[int]) -> FloatArray:
        past = self.cache.offset(0)
        try:
            return np.concatenate([self.decode([token]).copy() for token in tokens])
        except EngineError:
            self.cache.trim(0, self.cache.offset(0) - past)
            raise


class _Step:
    """Input and output arrays of single-token steps, bound once for each number of rows.

    Args:
        session: The open model.
        caches: Arrays [rows, heads, capacity, head_dim], key and value of each layer in turn.
        capacity: Tokens that a row may hold.

    Attributes:
        seconds: Time spent in the model so far.
    """

    def __init__(self, session: ModelSession, caches: tuple[CacheArray, ...], capacity: int) -> None:
        self._session = session
        self._caches = caches
        self._capacity = capacity
        rows = caches[0].shape[0]
        self._bindings: dict[int, Binding] = {}
        self._ids: IntArray = np.zeros((rows, 1), dtype=np.int64)
        self._positions: IntArray = np.zeros((rows, 1), dtype=np.int64)
        self._rope_tokens: IntArray = np.zeros(rows, dtype=np.int64)
        self._logits: FloatArray = np.empty((rows, 1, session.io.logits_width), dtype=np.float32)
        self._mask: IntArray = np.zeros((rows, 0), dtype=np.int64)
        self._masked = [0] * rows
        self.seconds = 0.0

    def run(self, tokens: Sequence[int], offsets: Sequence[int], rope_tokens: Sequence[int]) -> FloatArray:
        """Compute one token a row behind ``offsets`` tokens; return float32 [len(tokens), logits width], reused."""
        batch, longest = len(tokens), max(offsets) + 1
        if longest > self._mask.shape[1]:
            self._widen_mask(longest)
        self._ids[:batch, 0] = tokens
        self._positions[:batch, 0] = offsets
        self._rope_tokens[:batch] = rope_tokens
        for row, offset in enumerate(offsets):
            self._mask_row(row, offset + 1)
        binding = self._bindings.get(batch)
        if binding is None:
            binding = self._bindings[batch] = self._bind(batch)
        begun = time.perf_counter()
        binding.run()
        self.seconds += time.perf_counter() - begun
        rows: FloatArray = self._logits[:batch, 0]
        return rows

    def _widen_mask(self, tokens: int) -> None:
        width = min(-(-tokens // _MASK_STEP_TOKENS) * _MASK_STEP_TOKENS, self._capacity)
        self._mask = np.zeros((self._mask.shape[0], width), dtype=np.int64)
        self._masked = [0] * self._mask.shape[0]
        # The old mask is still bound there.
        self._bindings.clear()

    def _mask_row(self, row: int, tokens: int) -> None:
        """Make the row's mask ``tokens`` ones: usually one more than in the step before."""
        masked = self._masked[row]
        if masked < tokens:
            self._mask[row, masked:tokens] = 1
        else:
            self._mask[row, tokens:masked] = 0
        self._masked[row] = tokens

    def _bind(self, batch: int) -> Binding:
        binding = self._session.bind(tuple(cache[:batch] for cache in self._caches))
        binding.set_inputs(self._ids[:batch], self._mask[:batch], self._positions[:batch])
        binding.set_rope_tokens(self._rope_tokens[:batch])
        binding.set_logits(self._logits[:batch], start=0)
        return binding
