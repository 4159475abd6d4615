"""Small parts for tests of the engine without a model: tokenizers, and a runner whose model is a checksum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.engine.rotation import KeyRotation
from lamplighter_agent.engine.tokenizer import PackageTokenizer
from lamplighter_agent.errors import EngineError
from lamplighter_agent.package.manifest import GenerationDefaults

VOCAB_SIZE = 256
EOS = 0
SPECIAL = "<|end|>"
DEFAULTS = GenerationDefaults(eos_token_ids=(EOS,))


def byte_level_tokenizer() -> PackageTokenizer:
    """Return a tokenizer of one token a byte (ids in the order of the byte-level alphabet) and ``SPECIAL``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return PackageTokenizer(tokenizer, byte_fallback=False)


def byte_fallback_tokenizer() -> PackageTokenizer:
    """Return a SentencePiece-like tokenizer: three pieces, all byte tokens, and ``SPECIAL``."""
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581b": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "b")] if "b" in vocab else [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return PackageTokenizer(tokenizer, byte_fallback=True)


def memory_plan(
    *, slots: int = 4, context: int = 64, kv_tokens: int | None = None, chunk: int = 8, prefixes: int = 1 << 16
) -> MemoryPlan:
    """Return a plan with these limits; its bytes do not matter to a scheduler."""
    return MemoryPlan(
        budget_bytes=0,
        runtime_bytes=0,
        weights_bytes=0,
        scratch_bytes=0,
        headroom_bytes=0,
        kv_bytes_per_token=16,
        kv_tokens=slots * context if kv_tokens is None else kv_tokens,
        max_context_tokens=context,
        slots=slots,
        prefill_chunk_tokens=chunk,
        prefix_cache_bytes=prefixes,
    )


class ChecksumRunner:
    """A model whose next token is a checksum of the tokens in the slot's cache, read back from the cache itself.

    So a slot that was moved, trimmed or overwritten wrongly changes the text.

    Attributes:
        prefixes: A prefix cache of the plan's size.
        prefills: Number of tokens of every prefill chunk, in order.
        batches: Size of every decode batch, in order.
        fail_prefill: If set, a chunk that holds this token fails.
        fail_decode: If True, every decode step fails.
        drafts: Number of tokens of every verified draft step, in order.
        inexact: Numbers of rows at which drafts are not verified in one step.
        seconds_per_token: What a token of a prompt takes, as told to ``on_prefill``.
        on_prefill: Called with the seconds that a chunk takes.
    """

    def __init__(self, plan: MemoryPlan, *, moves_keys: bool = True) -> None:
        # A rotation by no angle: what is in the cache stays readable.
        rotations = (KeyRotation(np.zeros(1)),) if moves_keys else None
        self.cache = KVCache(
            CacheSpec(1, 2, 2), slots=plan.slots, capacity=plan.max_context_tokens, rotations=rotations
        )
        self.prefixes = PrefixCache(self.cache.spec, max_bytes=plan.prefix_cache_bytes)
        self.prefills: list[int] = []
        self.batches: list[int] = []
        self.fail_prefill: int | None = None
        self.fail_decode = False
        self.drafts: list[int] = []
        self.inexact: set[int] = set()
        self.seconds_per_token = 0.0
        self.on_prefill: Callable[[float], None] = lambda seconds: None

    def prefill(self, slot: int, tokens: list[int]) -> NDArray[np.float32]:
        if self.fail_prefill in tokens:
            raise EngineError("the checksum runner fails")
        self.prefills.append(len(tokens))
        self.on_prefill(len(tokens) * self.seconds_per_token)
        for token in tokens:
            self._append(slot, token)
        return self._logits(slot)

    @property
    def hidden_size(self) -> int | None:
        return None

    def hidden_states(self, slot: int, tokens: list[int]) -> NDArray[np.float32]:
        raise AssertionError("the checksum runner has no hidden states")

    def prefill_rows(self, slot: int, tokens: list[int]) -> NDArray[np.float32]:
        return np.stack([self.prefill(slot, [token]) for token in tokens])

    def decode(self, tokens: list[int]) -> NDArray[np.float32]:
        if self.fail_decode:
            raise EngineError("the checksum runner fails")
        self.batches.append(len(tokens))
        for slot, token in enumerate(tokens):
            self._append(slot, token)
        return np.stack([self._logits(slot) for slot in range(len(tokens))])

    def exactness(self, rows: int) -> bool | None:
        return rows not in self.inexact

    def verify(self, tokens: list[int]) -> NDArray[np.float32]:
        if self.fail_decode:
            raise EngineError("the checksum runner fails")
        assert len(tokens) not in self.inexact
        self.drafts.append(len(tokens))
        rows = []
        for token in tokens:
            self._append(0, token)
            rows.append(self._logits(0))
        return np.stack(rows)

    def _append(self, slot: int, token: int) -> None:
        offset = self.cache.offset(slot)
        for buffer in self.cache.buffers:
            buffer[slot, :, offset] = token
        self.cache.advance(slot, (token,))

    def _logits(self, slot: int) -> NDArray[np.float32]:
        checksums = []
        for buffer in self.cache.buffers:
            for head in range(2):
                checksum = 0
                for token in buffer[slot, head, : self.cache.offset(slot), 1]:
                    checksum = (checksum * 31 + int(token) + 7) % 1_000_003
                checksums.append(checksum)
        assert len(set(checksums)) == 1, "keys, values and heads of a slot disagree"
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        logits[1 + checksums[0] % (VOCAB_SIZE - 1)] = 9.0
        logits[1 + checksums[0] // 7 % (VOCAB_SIZE - 1)] += 8.0
        return logits
