from __future__ import annotations

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.rotation import KeyRotation, key_rotations, rope_frequencies
from lamplighter_agent.package.manifest import ModelFacts, RopeScaling

FREQUENCIES = np.array([1.0, 0.1, 0.01])
RNG = np.random.default_rng(3)


def turned(keys: NDArray[np.float64], position: int, *, interleaved: bool) -> NDArray[np.float64]:
    """Rotate [..., 8] features, the first 6 of them in pairs, as complex numbers."""
    half = len(FREQUENCIES)
    order = [0, 2, 4, 1, 3, 5] if interleaved else [0, 1, 2, 3, 4, 5]
    pairs = keys[..., order]
    values = (pairs[..., :half] + 1j * pairs[..., half:]) * np.exp(1j * position * FREQUENCIES)
    out = keys.copy()
    out[..., order] = np.concatenate([values.real, values.imag], axis=-1)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [-300, -1, 7])
def test_a_shifted_key_is_the_key_of_the_other_position(interleaved: bool, positions: int) -> None:
    plain = RNG.normal(size=(2, 5, 8))
    before = np.stack([turned(plain[:, n], 1000 + n, interleaved=interleaved) for n in range(5)], axis=1)
    after = np.stack([turned(plain[:, n], 1000 + n + positions, interleaved=interleaved) for n in range(5)], axis=1)
    shifted = KeyRotation(FREQUENCIES, interleaved).shift(before.astype(np.float32), positions)
    np.testing.assert_allclose(shifted, after, atol=2e-6)


def test_an_int8_key_is_shifted_within_a_step_of_its_scale() -> None:
    scales = RNG.uniform(0.01, 0.05, size=(2, 1, 8)).astype(np.float32)
    codes = RNG.integers(-80, 80, size=(2, 5, 8)).astype(np.int8)
    shifted = KeyRotation(FREQUENCIES, scales=scales).shift(codes, -9)
    exact = turned((codes * scales).astype(np.float64), -9, interleaved=False)
    assert shifted.dtype == np.int8
    inside = np.abs(exact / scales) < 127
    np.testing.assert_allclose((shifted * scales)[inside], exact[inside], atol=float(scales.max()) / 2 + 1e-6)


def model(**changes: object) -> ModelFacts:
    facts = ModelFacts(
        model_type="llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=10,
        max_position_embeddings=64,
        rope=RopeScaling(rope_type="default", rope_theta=100.0, rotary_dim=8),
    )
    return msgspec.structs.replace(facts, **changes)


def listed(rope: RopeScaling) -> list[float]:
    frequencies = rope_frequencies(rope)
    assert frequencies is not None
    values: list[float] = frequencies.tolist()
    return values


def test_frequencies_come_from_the_manifest_or_from_theta() -> None:
    default = RopeScaling(rope_type="default", rope_theta=100.0, rotary_dim=4)
    assert listed(default) == pytest.approx([1.0, 0.1])
    told = RopeScaling(rope_type="llama3", rope_theta=100.0, rotary_dim=4, inv_freq=(0.5, 0.25))
    assert listed(told) == [0.5, 0.25]
    assert rope_frequencies(msgspec.structs.replace(told, inv_freq=None)) is None


def test_windowed_layers_have_their_own_rope() -> None:
    local = RopeScaling(rope_type="default", rope_theta=10.0, rotary_dim=8, interleaved=True)
    found = key_rotations(model(local_rope=local, sliding_window=16, sliding_layers=(0, 2)))
    assert found is not None
    assert [rotation.interleaved for rotation in found] == [True, False, True, False]


def test_keys_that_are_not_rotated_stay_as_they_are() -> None:
    found = key_rotations(model(unrotated_layers=(1, 3)))
    assert found is not None
    keys = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    assert [bool((rotation.shift(keys, -5) == keys).all()) for rotation in found] == [False, True, False, True]


@pytest.mark.parametrize(
    "rope", [None, RopeScaling(rope_type="longrope", rope_theta=100.0, rotary_dim=8, shiftable=False)]
)
def test_keys_of_other_schemes_cannot_be_moved(rope: RopeScaling | None) -> None:
    assert key_rotations(model(rope=rope)) is None
    cache = KVCache(CacheSpec(4, 2, 8), slots=1, capacity=16, rotations=None)
    cache.advance(0, range(8))
    assert cache.evictable(0, 2, 3) == 0
    with pytest.raises(ValueError, match="cannot be moved"):
        cache.evict(0, 2, 3)


def sliding_cache() -> KVCache:
    """Return a cache with two slots whose first one holds 10 tokens, as a model at these positions writes them."""
    cache = KVCache(CacheSpec(4, 2, 8), slots=2, capacity=16, rotations=key_rotations(model()))
    write(cache, 0, list(range(10)), list(range(10)))
    return cache


def write(cache: KVCache, slot: int, tokens: list[int], positions: list[int]) -> None:
    frequencies = 100.0 ** -(np.arange(0, 8, 2) / 8)
    for index, buffer in enumerate(cache.buffers):
        for place, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            plain = np.random.default_rng([index, token]).normal(size=(2, 8))
            if index % 2 == 0:
                pairs = (plain[:, :4] + 1j * plain[:, 4:]) * np.exp(1j * position * frequencies)
                plain = np.concatenate([pairs.real, pairs.imag], axis=-1)
            buffer[slot, :, place] = plain
    cache.advance(slot, tokens)


def test_evicting_leaves_the_cache_as_if_the_tokens_had_never_been() -> None:
    cache = sliding_cache()
    cache.evict(0, 2, 3)
    assert cache.tokens(0) == (0, 1, 5, 6, 7, 8, 9)
    expected = KVCache(CacheSpec(4, 2, 8), slots=1, capacity=16)
    write(expected, 0, [0, 1, 5, 6, 7, 8, 9], list(range(7)))
    for buffer, wanted in zip(cache.buffers, expected.buffers, strict=True):
        np.testing.assert_allclose(buffer[0, :, :7], wanted[0, :, :7], atol=1e-6)


def test_only_what_lies_before_the_gap_is_a_prefix() -> None:
    cache = sliding_cache()
    assert cache.prefix(0) == cache.tokens(0)
    cache.evict(0, 4, 3)
    cache.advance(0, [11])
    assert cache.prefix(0) == (0, 1, 2, 3)
    cache.evict(0, 2, 1)
    assert cache.prefix(0) == (0, 1)
    cache.swap(0, 1)
    assert (cache.prefix(1), cache.prefix(0)) == ((0, 1), ())
    cache.copy(1, 0, 4)
    assert cache.prefix(0) == (0, 1)
    cache.copy(1, 0, 2)
    cache.advance(0, [5])
    assert cache.prefix(0) == (0, 1, 5)
    cache.trim(1, 100)
    cache.advance(1, [5, 6, 7])
    assert cache.prefix(1) == (5, 6, 7)


def test_more_than_there_is_cannot_be_evicted() -> None:
    cache = sliding_cache()
    with pytest.raises(ValueError, match=r"holds 10 tokens, not 4 \+ 7"):
        cache.evict(0, 4, 7)
    assert cache.offset(0) == 10
