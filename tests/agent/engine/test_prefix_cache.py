from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import CacheArray, KVCache
from lamplighter_agent.engine.prefix_cache import PrefixCache, common_prefix

SPEC = CacheSpec(layers=2, heads=3, head_dim=4)
CAPACITY = 64
BYTES = SPEC.bytes_per_token


def write(cache: KVCache, slot: int, tokens: list[int]) -> None:
    """Fill a slot: every value of a token depends on all tokens up to it, on layer, kind and head."""
    cache.trim(slot, cache.capacity)
    for position in range(len(tokens)):
        seen = hash(tuple(tokens[: position + 1])) % 10_007
        for index, buffer in enumerate(cache.buffers):
            for head in range(SPEC.heads):
                buffer[slot, head, position] = seen + 0.125 * index + 0.01 * head + np.arange(SPEC.head_dim)
    cache.advance(slot, tokens)


def stored(prefixes: PrefixCache, tokens: list[int], *, pinned: bool = False) -> int:
    cache = KVCache(SPEC, slots=2, capacity=CAPACITY)
    write(cache, 1, tokens)
    return prefixes.store(cache, 1, len(tokens), pinned=pinned)


def check_restores(prefixes: PrefixCache, tokens: list[int]) -> int:
    """Restore and compare with what a slot would hold if the tokens were computed; return how many came."""
    cache, expected = KVCache(SPEC, slots=2, capacity=CAPACITY), KVCache(SPEC, slots=2, capacity=CAPACITY)
    write(cache, 1, [7, 7, 7])
    write(expected, 1, tokens)
    length = prefixes.restore(cache, 1, tokens)
    assert length == prefixes.match(tokens)
    assert cache.tokens(1) == tuple(tokens[:length])
    assert cache.offset(0) == 0
    for buffer, wanted in zip(cache.buffers, expected.buffers, strict=True):
        np.testing.assert_array_equal(buffer[1, :, :length], wanted[1, :, :length])
    return length


def longest(sequences: list[list[int]], tokens: list[int]) -> int:
    """The rule of the cache, said in the plainest way."""
    return max(
        (sum(1 for _ in iter_common(sequence, tokens)) for sequence in sequences),
        default=0,
    )


def iter_common(first: list[int], second: list[int]) -> list[int]:
    common = []
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        common.append(one)
    return common


def put_back(prefixes: PrefixCache, tokens: list[int], rows: CacheArray) -> None:
    def fill(target: CacheArray, begin: int) -> None:
        target[:] = rows[begin : begin + len(target)]

    assert prefixes.store_filled(tokens, fill) == len(tokens)


SEQUENCES = st.lists(st.integers(0, 2), min_size=0, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(SEQUENCES, max_size=12), st.lists(SEQUENCES, min_size=1, max_size=6))
def test_without_a_bound_the_longest_prefix_is_found_and_shared_tokens_are_held_once(
    added: list[list[int]], asked: list[list[int]]
) -> None:
    prefixes = PrefixCache(SPEC, max_bytes=1 << 30)
    for tokens in added:
        assert stored(prefixes, tokens) == len(tokens)
    distinct = {tuple(tokens[:end]) for tokens in added for end in range(1, len(tokens) + 1)}
    assert prefixes.nbytes == len(distinct) * BYTES
    for tokens in [*asked, *added]:
        assert check_restores(prefixes, tokens) == longest(added, tokens)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), SEQUENCES), max_size=25))
def test_under_a_bound_what_comes_back_is_right_and_the_bound_holds(
    room: int, work: list[tuple[bool, list[int]]]
) -> None:
    prefixes = PrefixCache(SPEC, max_bytes=room * BYTES)
    seen: list[list[int]] = []
    for insert, tokens in work:
        if insert:
            kept = stored(prefixes, tokens)
            seen.append(tokens)
            assert kept == prefixes.match(tokens)
            # The newest sequence has the whole room to itself if it needs it.
            assert kept == min(len(tokens), room)
        else:
            assert check_restores(prefixes, tokens) <= longest(seen, tokens)
        assert prefixes.nbytes <= room * BYTES
        assert prefixes.nbytes == BYTES * sum(
            len(part) for part in {id(rows): rows for _, parts in prefixes.sequences() for rows in parts}.values()
        )


def test_the_sequence_that_was_not_used_for_longest_goes_first() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=10 * BYTES)
    first, second, third = [1] * 4, [2] * 4, [3] * 4
    stored(prefixes, first)
    stored(prefixes, second)
    check_restores(prefixes, first)
    stored(prefixes, third)
    assert [prefixes.match(tokens) for tokens in (first, second, third)] == [4, 0, 4]


def test_a_shared_beginning_outlives_its_ends() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=10 * BYTES)
    shared = [5, 6, 7, 8]
    stored(prefixes, [*shared, 1, 1])
    stored(prefixes, [*shared, 2, 2, 2])
    stored(prefixes, [*shared, 3, 3])
    assert prefixes.match([*shared, 1, 1]) == 4
    assert prefixes.match([*shared, 3, 3]) == 6


@pytest.mark.parametrize("held", range(6))
def test_what_the_slot_holds_already_is_left_as_it_is(held: int) -> None:
    prefixes = PrefixCache(SPEC, max_bytes=100 * BYTES)
    stored(prefixes, [5, 6, 7, 1, 1])
    stored(prefixes, [5, 6, 7, 2, 2, 2])  # the last three lie in a run of their own
    wanted = [5, 6, 7, 2, 2, 2]
    cache, expected = (KVCache(SPEC, slots=1, capacity=CAPACITY) for _ in range(2))
    write(expected, 0, wanted)
    write(cache, 0, [*wanted[:held], 9, 9, 9])
    for buffer in cache.buffers:
        buffer[0, :, :held] = -1.0
    assert prefixes.restore(cache, 0, wanted, held=held) == 6
    assert cache.tokens(0) == tuple(wanted)
    for buffer, whole in zip(cache.buffers, expected.buffers, strict=True):
        assert (buffer[0, :, :held] == -1.0).all()
        np.testing.assert_array_equal(buffer[0, :, held:6], whole[0, :, held:6])


def test_a_pinned_sequence_stays_and_others_get_what_is_left() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=6 * BYTES)
    stored(prefixes, [1, 2, 3, 4], pinned=True)
    assert stored(prefixes, [9] * 5) == 2
    assert prefixes.match([1, 2, 3, 4]) == 4
    assert prefixes.match([9] * 5) == 2


def test_a_pin_holds_where_another_sequence_leaves_it_half_way() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=8 * BYTES)
    stored(prefixes, [1, 2, 3, 4], pinned=True)
    stored(prefixes, [1, 2, 8, 8])
    stored(prefixes, [9] * 4)
    assert prefixes.match([1, 2, 3, 4]) == 4
    assert prefixes.match([1, 2, 8, 8]) == 2


def test_a_smaller_bound_evicts_the_pinned_last_and_zero_evicts_all() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=10 * BYTES)
    stored(prefixes, [1, 2, 3], pinned=True)
    stored(prefixes, [9] * 4)
    prefixes.resize(3 * BYTES)
    assert (prefixes.match([1, 2, 3]), prefixes.match([9] * 4)) == (3, 0)
    prefixes.resize(0)
    assert (prefixes.nbytes, prefixes.match([1, 2, 3])) == (0, 0)
    assert stored(prefixes, [1, 2, 3]) == 0


def test_more_than_the_slot_holds_cannot_be_stored() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=10 * BYTES)
    with pytest.raises(ValueError, match="slot 0 holds 0 tokens, not 1"):
        prefixes.store(KVCache(SPEC, slots=1, capacity=4), 0, 1)
    assert prefixes.nbytes == 0


def test_sequences_come_last_used_first_and_can_be_put_back() -> None:
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20)
    for tokens in ([1, 2, 3, 4], [1, 2, 5], [6]):
        stored(prefixes, tokens)
    check_restores(prefixes, [1, 2, 3, 4])
    taken = [(tokens.tolist(), np.concatenate(parts)) for tokens, parts in prefixes.sequences()]
    assert [tokens for tokens, _ in taken] == [[1, 2, 3, 4], [6], [1, 2, 5]]
    other = PrefixCache(SPEC, max_bytes=1 << 20)
    for tokens, rows in taken:
        put_back(other, tokens, rows)
    for tokens, _ in taken:
        assert check_restores(other, tokens) == len(tokens)


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)]
)
def test_common_prefix(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == length


def test_memory_comes_back_when_a_part_of_a_run_is_evicted() -> None:
    spec = CacheSpec(layers=4, heads=4, head_dim=64)
    cache = KVCache(spec, slots=1, capacity=2048)
    for buffer in cache.buffers:
        buffer[:] = 1.0
    cache.advance(0, range(2048))
    prefixes = PrefixCache(spec, max_bytes=1 << 30)
    prefixes.store(cache, 0, 2048)
    # Another sequence leaves it at 1024, which cuts the run in two.
    cache.trim(0, 1024)
    cache.advance(0, [5])
    prefixes.store(cache, 0, 1025, pinned=True)
    held = _resident_bytes()
    prefixes.resize(1025 * spec.bytes_per_token)
    assert held - _resident_bytes() > 0.9 * 1023 * spec.bytes_per_token


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
