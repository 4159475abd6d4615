from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import KVCache

SPEC = CacheSpec(layers=2, heads=3, head_dim=4)


def filled(slots: int = 3, capacity: int = 10) -> KVCache:
    """Return a cache whose slot n holds n + 2 tokens of the value 100 * slot + position."""
    cache = KVCache(SPEC, slots=slots, capacity=capacity)
    for slot in range(slots):
        for buffer in cache.buffers:
            buffer[slot, :, : slot + 2] = (100 * slot + np.arange(slot + 2)).reshape(1, -1, 1)
        cache.advance(slot, range(slot + 2))
    return cache


def tokens(cache: KVCache, slot: int) -> list[float]:
    """Return the values of a slot's tokens, which must agree in all layers and heads."""
    rows = np.stack([buffer[slot, :, : cache.offset(slot)] for buffer in cache.buffers])
    assert (rows == rows[:1, :1, :, :1]).all()
    values: list[float] = rows[0, 0, :, 0].tolist()
    return values


def test_buffers_have_the_layout_of_the_graph() -> None:
    cache = KVCache(SPEC, slots=3, capacity=10)
    # 256 tokens of 48 bytes fill whole pages.
    assert [buffer.shape for buffer in cache.buffers] == [(3, 3, 256, 4)] * 4
    assert all(buffer[1:2].flags.c_contiguous and buffer[:2].flags.c_contiguous for buffer in cache.buffers)
    assert all(not buffer.any() for buffer in cache.buffers)


def test_offset_and_bytes_follow_the_tokens() -> None:
    cache = filled()
    assert [cache.offset(slot) for slot in range(3)] == [2, 3, 4]
    assert cache.nbytes == 9 * SPEC.bytes_per_token == 9 * 2 * 2 * 3 * 4 * 4


def test_a_slot_cannot_hold_more_than_its_capacity() -> None:
    cache = filled(capacity=6)
    cache.advance(0, range(4))
    with pytest.raises(ValueError, match=r"slot 0: 6 \+ 1 tokens exceed capacity 6"):
        cache.advance(0, (1,))
    assert cache.offset(0) == 6


def test_trim_forgets_the_last_tokens() -> None:
    cache = filled()
    assert cache.trim(2, 3) == 3
    assert tokens(cache, 2) == [200.0]
    assert cache.trim(2, 5) == 1
    assert cache.offset(2) == 0


@pytest.mark.parametrize(("first", "second"), [(0, 2), (2, 0), (1, 1)])
def test_swap_exchanges_contents_and_offsets(first: int, second: int) -> None:
    cache = filled()
    before = {slot: tokens(cache, slot) for slot in range(3)}
    cache.swap(first, second)
    after = {slot: tokens(cache, slot) for slot in range(3)}
    assert after == before | {first: before[second], second: before[first]}


def test_swap_with_an_empty_slot_moves() -> None:
    cache = filled()
    cache.trim(0, 10)
    cache.swap(0, 2)
    assert (cache.offset(0), cache.offset(2)) == (4, 0)
    assert tokens(cache, 0) == [200.0, 201.0, 202.0, 203.0]


def test_release_gives_memory_back_and_leaves_the_neighbours() -> None:
    # 1.5 MiB a slot and buffer, so that whole pages lie inside the middle slot.
    cache = KVCache(CacheSpec(layers=1, heads=3, head_dim=64), slots=3, capacity=2048)
    for buffer in cache.buffers:
        buffer[:] = 1.0
    for slot in range(3):
        cache.advance(slot, range(2048))
    held = _resident_bytes()
    cache.release(1)
    assert held - _resident_bytes() > 2 * 1024 * 1024
    assert cache.offset(1) == 0
    for buffer in cache.buffers:
        assert buffer[0].all()
        assert buffer[2].all()


def test_cut_keeps_the_first_tokens_and_gives_the_rest_of_the_slot_back() -> None:
    cache = KVCache(CacheSpec(layers=1, heads=3, head_dim=64), slots=3, capacity=2048)
    for buffer in cache.buffers:
        buffer[:] = 1.0
    for slot in range(3):
        cache.advance(slot, range(2048))
    held = _resident_bytes()
    cache.cut(1, 100)
    assert held - _resident_bytes() > 2 * 1024 * 1024
    assert cache.tokens(1) == tuple(range(100))
    for buffer in cache.buffers:
        assert buffer[1, :, :100].all()
        assert not buffer[1, :, 112:].any()
        assert buffer[0].all()
        assert buffer[2].all()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("add", "cut", "swap", "copy", "release")),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 64),
    ),
    max_size=12,
)


@pytest.mark.parametrize(
    ("heads", "head_dim", "capacity"), [(3, 64, 64), (2, 16, 96)], ids=["heads of whole pages", "heads that share one"]
)
@given(steps=STEPS)
def test_tokens_survive_what_is_done_to_others_and_all_pages_come_back(
    heads: int, head_dim: int, capacity: int, steps: list[tuple[str, int, int, int]]
) -> None:
    cache = KVCache(CacheSpec(layers=1, heads=heads, head_dim=head_dim), slots=3, capacity=capacity)
    numbers = itertools.count(1)
    held: list[list[int]] = [[], [], []]
    for step, one, other, tokens in steps:
        if step == "add":
            added = [next(numbers) for _ in range(min(tokens, cache.room(one)))]
            for buffer in cache.buffers:
                buffer[one, :, len(held[one]) : len(held[one]) + len(added)] = np.array(added)[None, :, None]
            cache.advance(one, added)
            held[one] += added
        elif step == "cut":
            cache.cut(one, tokens, coming=16 * other)
            del held[one][tokens:]
        elif step == "swap":
            cache.swap(one, other)
            held[one], held[other] = held[other], held[one]
        elif step == "copy":
            length = min(tokens, len(held[one]))
            cache.copy(one, other, length)
            held[other] = held[one][:length]
        else:
            cache.release(one)
            held[one] = []
        for slot, expected in enumerate(held):
            assert cache.tokens(slot) == tuple(expected)
            for buffer in cache.buffers:
                assert (buffer[slot, :, : len(expected)] == np.array(expected)[None, :, None]).all()
    for slot in range(3):
        cache.cut(slot, 0)
    if heads == 3:  # else nothing is given back of a page that holds the end of another head
        assert not any(buffer.any() for buffer in cache.buffers)


def test_mirrors_are_slot_0_in_every_row() -> None:
    cache = filled(capacity=300)
    mirrors = cache.mirrors(4)
    assert [mirror.shape for mirror in mirrors] == [(4, 3, 512, 4)] * 4
    cache.buffers[1][0, 2, 299] = 7.0
    assert (mirrors[1][:, 2, 299] == 7.0).all()
    mirrors[2][3, 0, 5] = -3.0
    assert (cache.buffers[2][0, 0, 5] == -3.0).all()
    assert not (cache.buffers[2][1] == -3.0).any()
    cache.release(0)
    assert not mirrors[1].any()


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123
        return int(stream.read().split()[1]) * 4096


def test_reserving_a_large_capacity_commits_nothing() -> None:
    before = _resident_bytes()
    cache = KVCache(CacheSpec(layers=4, heads=8, head_dim=128), slots=8, capacity=16384)
    assert sum(buffer.nbytes for buffer in cache.buffers) == 4 * 1024**3
    assert _resident_bytes() - before < 16 * 1024 * 1024


def test_long_rope_chooses_a_slots_factors_by_what_is_planned() -> None:
    cache = KVCache(CacheSpec(layers=1, heads=1, head_dim=4, short_rope_tokens=8), slots=2, capacity=16)
    cache.plan(0, 8)
    cache.advance(0, range(8))
    cache.plan(1, 9)
    cache.advance(1, range(8))
    assert (cache.rope_tokens(0), cache.rope_tokens(1)) == (0, 9)
    assert (cache.room(0), cache.room(1)) == (0, 8)
    assert (cache.needs_long_rope(0), cache.needs_long_rope(1)) == (True, False)
    assert (len(cache.prefix(0)), len(cache.prefix(1))) == (8, 0)
    cache.swap(0, 1)
    assert (cache.rope_tokens(0), cache.rope_tokens(1)) == (9, 0)
    cache.copy(0, 1, 3)
    assert cache.rope_tokens(1) == 9
    cache.release(1)
    assert cache.rope_tokens(1) == 0


def test_without_long_rope_a_plan_changes_nothing() -> None:
    cache = KVCache(SPEC, slots=1, capacity=16)
    cache.plan(0, 1000)
    cache.advance(0, range(16))
    assert (cache.rope_tokens(0), cache.room(0), cache.needs_long_rope(0)) == (0, 0, False)
