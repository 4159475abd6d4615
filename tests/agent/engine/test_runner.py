"""Kernels of the installed onnxruntime on a tiny model: what the engine's exactness rests on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.kv_cache import CacheArray, KVCache
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prepare import prepare
from lamplighter_agent.engine.runner import ModelRunner
from lamplighter_agent.engine.session import Binding
from lamplighter_agent.errors import EngineError
from support.families import write_family_checkpoint
from support.tiny_model import build_tiny_package

OPTIONS = EngineOptions(max_context_tokens=512, slots=4, threads=2)
PROMPT = [*range(3, 60), *range(30, 50)]
NEXT = [40, 41, 42, 43, 44, 45, 46, 47]


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(tiny_package: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    loaded = Engine.load(tiny_package, options=msgspec.structs.replace(OPTIONS, kv_cache_dtype=request.param))
    yield loaded
    loaded.close()


@pytest.fixture
def runner(engine: Engine) -> Iterator[ModelRunner]:
    """A runner with the prompt in slot 0."""
    fresh = ModelRunner(engine.session, engine.runner.cache)
    fresh.prefill(0, PROMPT)
    yield fresh
    for slot in range(fresh.cache.slots):
        fresh.cache.release(slot)


def singly(runner: ModelRunner, tokens: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    rows = np.stack([runner.decode([token])[0].copy() for token in tokens])
    runner.cache.trim(0, len(tokens))
    return rows


def test_what_a_failing_chunk_wrote_is_given_back(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Binding.run

    def run_and_fail(self: Binding) -> None:
        original(self)
        raise EngineError("out of memory")

    monkeypatch.setattr(Binding, "run", run_and_fail)
    cache = runner.cache
    with pytest.raises(EngineError):
        runner.prefill(1, [3 + place % 40 for place in range(400)])
    assert cache.offset(1) == 0
    assert all(buffer[1].any() for buffer in cache.buffers)
    cache.cut(1, 0)
    assert not any(buffer[1].any() for buffer in cache.buffers)


@pytest.mark.parametrize("rows", [2, 3, 4, 6, 8])
def test_a_verified_draft_has_the_bits_of_decode_steps(runner: ModelRunner, rows: int) -> None:
    tokens = NEXT[:rows]
    expected = singly(runner, tokens)
    assert runner.exactness(rows) is None
    # The second time it is one step where the kernels agree, and single steps again where they do not.
    for _ in range(2):
        assert np.array_equal(runner.verify(tokens), expected)
        assert runner.exactness(rows) is not None
        assert runner.cache.offset(0) == len(PROMPT) + rows
        after = runner.decode([50])[0].copy()
        runner.cache.trim(0, rows + 1)
        for token in tokens:
            runner.decode([token])
        assert np.array_equal(runner.decode([50])[0], after)
        runner.cache.trim(0, rows + 1)


def test_kernels_that_differ_in_one_bit_are_found_out(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = singly(runner, NEXT[:4])
    original = ModelRunner._run_draft

    def off_by_a_bit(self: ModelRunner, tokens: list[int], poison: float, *, keep: bool = False) -> object:
        logits = original(self, tokens, poison, keep=keep)
        assert logits is not None
        logits[2, 5] = np.nextafter(logits[2, 5], np.float32(9.0))
        return logits

    monkeypatch.setattr(ModelRunner, "_run_draft", off_by_a_bit)
    assert np.array_equal(runner.verify(NEXT[:4]), expected)
    assert runner.exactness(4) is False
    assert runner.exactness(2) is False


def unshared(cache: KVCache, rows: int) -> tuple[CacheArray, ...]:
    """Rows with memory of their own, as when each is read before the others are written: none sees their tokens."""
    rows_apart = tuple(np.repeat(buffer[:1], rows, axis=0) for buffer in cache.buffers)
    for buffer in rows_apart:
        buffer[:, :, len(PROMPT) :] = np.nan if cache.spec.dtype == "float32" else 127
    return rows_apart


def test_a_row_that_is_read_before_it_is_written_is_found_out(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = singly(runner, NEXT[:3])
    monkeypatch.setattr(KVCache, "mirrors", unshared)
    assert np.array_equal(runner.verify(NEXT[:3]), expected)
    assert runner.exactness(3) is False


def test_a_row_of_floats_that_is_read_too_early_is_found_out_in_every_step(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = singly(runner, NEXT[:3])
    runner.verify(NEXT[:3])
    runner.cache.trim(0, 3)
    if not runner.exactness(3) or runner.cache.spec.dtype != "float32":
        pytest.skip("only float32 can be poisoned, and only where the kernels for one row and for three agree")
    broken = ModelRunner(runner._session, runner.cache)
    broken._exact = dict(runner._exact)
    monkeypatch.setattr(KVCache, "mirrors", unshared)
    assert np.array_equal(broken.verify(NEXT[:3]), expected)
    assert broken.exactness(3) is False


def test_codes_are_not_drafted_for_where_rows_may_be_read_too_early(tmp_path: Path) -> None:
    """Bounded scores take another kernel, which works row by row; with floats too early a reading shows."""
    package = build_tiny_package(write_family_checkpoint(tmp_path / "gemma2", "gemma2"), tmp_path / "p", "int4")
    for dtype, writes_first in (("float32", True), ("int8", False)):
        with Engine.load(package, options=msgspec.structs.replace(OPTIONS, kv_cache_dtype=dtype)) as engine:
            assert engine.session.writes_first is writes_first
            assert engine.runner.exactness(2) is (None if writes_first else False)


def test_codes_are_drafted_for_in_a_prepared_copy_too(tiny_package: Path, tmp_path: Path) -> None:
    """The runtime writes all attributes into it, also those of the other kernel, as zeros."""
    prepare(tiny_package, tmp_path)
    options = msgspec.structs.replace(OPTIONS, kv_cache_dtype="int8")
    with Engine.load(tiny_package, options=options, prepared_root=tmp_path) as engine:
        assert engine.prepared
        assert engine.session.writes_first


def test_without_memory_for_it_drafts_are_computed_singly(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = singly(runner, NEXT[:2])

    def refuse(rows: int) -> tuple[CacheArray, ...]:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(runner.cache, "mirrors", refuse)
    assert np.array_equal(runner.verify(NEXT[:2]), expected)
    assert runner.exactness(2) is False


def test_a_batch_has_the_bits_of_single_steps(runner: ModelRunner) -> None:
    expected = [singly(runner, NEXT[:1])[0]]
    for slot in range(1, 4):
        runner.prefill(slot, PROMPT[: 20 * slot])
        runner.cache.swap(0, slot)
        expected.append(singly(runner, [NEXT[slot]])[0])
        runner.cache.swap(0, slot)
    runner.verify(NEXT[:2])
    runner.cache.trim(0, 2)
    for slots in (4, 3, 2):
        batch = runner.decode(NEXT[:slots])
        np.testing.assert_allclose(batch, expected[:slots], rtol=0, atol=1e-3)
        # With AVX2 alone the projections' kernel for one row sums in another order than that for several.
        assert np.array_equal(batch, expected[:slots]) or not runner.exactness(2)
        for slot in range(slots):
            runner.cache.trim(slot, 1)


@pytest.mark.parametrize("chunk", [2, 7, 16, 75])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(runner: ModelRunner, chunk: int) -> None:
    whole = runner.prefill(1, PROMPT)
    parts = [PROMPT[start : start + chunk] for start in range(0, len(PROMPT), chunk)]
    if len(parts[-1]) == 1:
        parts[-2:] = [[*parts[-2], *parts[-1]]]
    for part in parts:
        last = runner.prefill(2, part)
    assert np.array_equal(last, whole)
    for buffer in runner.cache.buffers:
        assert np.array_equal(buffer[1, :, : len(PROMPT)], buffer[2, :, : len(PROMPT)])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_text_with_speculation_is_the_text_without(engine: Engine, temperature: float) -> None:
    params = GenerationParams(max_tokens=150, temperature=temperature, seed=7, ignore_eos=True, repetition_penalty=1.02)
    plain = msgspec.structs.replace(params, speculation=False)
    prompt = [*PROMPT, *PROMPT, *PROMPT[:9]]
    expected = [token.token_id for token in engine.generate(prompt, plain)]
    for _ in range(2):
        *tokens, last = engine.generate(prompt, params)
        assert [token.token_id for token in tokens] == expected[:-1]
        assert last.finished is not None
        assert last.finished.usage.generated_tokens == 150


def times_resident() -> Counter[str]:
    """Count, for each part of the cache's memory that is resident, the mappings that it is resident in."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    parts = re.findall(r"s ([0-9a-f]+) .* (\d+) +/memfd:lamplighter-kv.*\n(?:\w+: .*\n)*?Rss: +([1-9]\d*) kB", smaps)
    return Counter(f"{inode} {offset}" for offset, inode, _ in parts)


def test_what_drafts_map_several_times_is_mapped_once_afterwards(runner: ModelRunner) -> None:
    expected = singly(runner, NEXT[:4])
    runner.verify(NEXT[:4])
    runner.cache.trim(0, 4)
    assert max(times_resident().values()) > 1
    runner.cache.unmap_mirrors()
    assert max(times_resident().values()) == 1
    assert np.array_equal(runner.verify(NEXT[:4]), expected)
