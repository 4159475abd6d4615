"""The depths at which a family's float32 graph is compared with transformers; logits of the same tokens each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from lamplighter_builder.parity import Parity, Reference, compare_logits
from lamplighter_builder.runner import Cache, IntArray, Runner

VOCAB: Final = 384
LONG_TOKENS: Final = 120
"""Beyond every window, scaled context and LongRoPE switch of the tiny families."""


def random_tokens(rows: int, length: int) -> IntArray:
    """Return int64 [rows, length], the same on every call."""
    return np.random.default_rng(7).integers(3, VOCAB, size=(rows, length))


def short_prompt(reference: Reference, runner: Runner) -> Parity:
    """One run over a prompt inside every window and before LongRoPE's switch."""
    return _whole(reference, runner, 20)


def long_prompt(reference: Reference, runner: Runner) -> Parity:
    """One run over a prompt beyond the sliding window and past LongRoPE's switch."""
    return _whole(reference, runner, LONG_TOKENS)


def chunks(reference: Reference, runner: Runner) -> Parity:
    """The long prompt in chunks; the first ones alone are before the switch."""
    prompt, cache, found = random_tokens(1, LONG_TOKENS), runner.empty_cache(), []
    for start, end in ((0, 20), (20, 21), (21, 70), (70, LONG_TOKENS)):
        logits, cache = runner.run(prompt[:, start:end], cache, rope_tokens=LONG_TOKENS)
        found.append(logits)
    return compare_logits(reference.logits(prompt), np.concatenate(found, axis=1))


def short_decode(reference: Reference, runner: Runner) -> Parity:
    """20 tokens at once, then 30 one by one, which ends beyond the window and before the switch."""
    return _decode(reference, runner, 20, 50)


def long_decode(reference: Reference, runner: Runner) -> Parity:
    """40 tokens at once, then 80 one by one across window and switch, planned for all of them."""
    return _decode(reference, runner, 40, LONG_TOKENS)


def ragged_decode(reference: Reference, runner: Runner) -> Parity:
    """One step of two rows: one short, padded behind its tokens, one beyond window and switch."""
    lengths, step = (9, LONG_TOKENS - 1), np.array([[11], [12]], dtype=np.int64)
    rows = [random_tokens(1, length) for length in lengths]
    caches = [runner.run(row, runner.empty_cache())[1] for row in rows]
    shared = runner.empty_cache(2).arrays
    for name, array in shared.items():
        shared[name] = np.zeros((2, array.shape[1], max(lengths), array.shape[3]), dtype=np.float32)
        for index, cache in enumerate(caches):
            shared[name][index, :, : cache.offset] = cache.arrays[name][0]
    mask = (np.arange(max(lengths) + 1) <= np.array(lengths)[:, None]).astype(np.int64)
    found, _ = runner.run(step, Cache(max(lengths), shared), mask=mask)
    expected = [
        reference.logits(np.concatenate([row, step[index : index + 1]], axis=1))[:, -1:]
        for index, row in enumerate(rows)
    ]
    return compare_logits(np.concatenate(expected), found)


def ragged_prompt(reference: Reference, runner: Runner) -> Parity:
    """One run over two prompts of different lengths, the shorter one padded behind its tokens."""
    prompt, short = random_tokens(2, 40), 27
    mask = np.ones((2, 40), dtype=np.int64)
    mask[0, short:] = 0
    found, _ = runner.run(prompt, runner.empty_cache(2), mask=mask)
    expected = np.concatenate([reference.logits(prompt[:1, :short]), reference.logits(prompt[1:])], axis=1)
    return compare_logits(expected, np.concatenate([found[:1, :short], found[1:]], axis=1))


Depth = Callable[[Reference, Runner], Parity]

DEPTHS: Final[Mapping[str, Depth]] = MappingProxyType(
    {
        depth.__name__: depth
        for depth in (short_prompt, long_prompt, chunks, short_decode, long_decode, ragged_decode, ragged_prompt)
    }
)


def _whole(reference: Reference, runner: Runner, length: int) -> Parity:
    prompt = random_tokens(1, length)
    return compare_logits(reference.logits(prompt), runner.run(prompt, runner.empty_cache())[0])


def _decode(reference: Reference, runner: Runner, prefilled: int, total: int) -> Parity:
    tokens = random_tokens(1, total)
    logits, cache = runner.run(tokens[:, :prefilled], runner.empty_cache(), rope_tokens=total)
    found = [logits]
    for position in range(prefilled, total):
        logits, cache = runner.run(tokens[:, position : position + 1], cache, rope_tokens=total)
        found.append(logits)
    return compare_logits(reference.logits(tokens), np.concatenate(found, axis=1))
