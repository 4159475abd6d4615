"""Sliding on real models: a cache whose gap was closed next to one that was computed anew."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.memory import MIB
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams

LICENCE = Path(__file__).parents[3] / "LICENSE"
OPTIONS = EngineOptions(max_context_tokens=128, slots=1, threads=2, prefix_cache_bytes=0, kv_cache_dtype="float32")
KEEP, GONE, HELD = 8, 40, 100


def slid_and_computed(package: Path, options: EngineOptions) -> tuple[Engine, Engine]:
    """Return an engine that forgot tokens of its cache, and one that only ever saw the others."""
    tokens = [3 + (7 * position) % 300 for position in range(HELD)]
    slid, computed = (Engine.load(package, options=options) for _ in range(2))
    slid.runner.prefill(0, tokens)
    slid.runner.cache.evict(0, KEEP, GONE)
    computed.runner.prefill(0, tokens[:KEEP] + tokens[KEEP + GONE :])
    assert slid.runner.cache.tokens(0) == computed.runner.cache.tokens(0)
    return slid, computed


def test_moved_keys_are_those_that_would_be_computed(tiny_package: Path) -> None:
    slid, computed = slid_and_computed(tiny_package, OPTIONS)
    left = HELD - GONE
    # Keys and values of the first layer depend on token and position alone, so both must agree there.
    for kind in (0, 1):
        moved, fresh = (engine.runner.cache.buffers[kind][0, :, :left] for engine in (slid, computed))
        np.testing.assert_allclose(moved, fresh, atol=2e-5)


def test_moved_int8_keys_are_those_that_would_be_computed_within_a_step(tiny_package: Path) -> None:
    slid, computed = slid_and_computed(tiny_package, msgspec.structs.replace(OPTIONS, kv_cache_dtype="int8"))
    left = HELD - GONE
    moved, fresh = (engine.runner.cache.buffers[0][0, :, :left].astype(np.int32) for engine in (slid, computed))
    # Codes of a pair mix when it turns: each adds at most its own half step, scaled to the other's.
    assert (np.abs(moved - fresh) <= 2).mean() > 0.99
    values, wanted = (engine.runner.cache.buffers[1][0, :, :left] for engine in (slid, computed))
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(1200)
def test_a_model_reads_on_as_well_through_a_sliding_cache_as_through_one_computed_anew(smollm2_package: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, max_context_tokens=512)
    engine = Engine.load(smollm2_package, options=options)
    tokens = engine.tokenizer.encode(LICENCE.read_text(encoding="utf-8"), special=False)[:2048]
    losses = {}
    for way in ("slide", "anew"):
        engine.runner.cache.release(0)
        losses[way] = _losses(engine, tokens, slide=way == "slide")
    settled = {way: float(np.mean(values[600:])) for way, values in losses.items()}
    assert abs(settled["slide"] - settled["anew"]) < 0.05, settled
    assert settled["slide"] < np.mean(losses["slide"][:400]) + 0.5, settled


def _losses(engine: Engine, tokens: list[int], *, slide: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the negative log-likelihood (nats) of each token, read 32 at a time through the engine's cache."""
    runner, cache, found = engine.runner, engine.runner.cache, []
    for begin in range(0, len(tokens) - 33, 32):
        held = cache.offset(0)
        if held + 32 > cache.capacity:
            gone = (held - KEEP) // 4
            if slide:
                cache.evict(0, KEEP, gone)
            else:
                recent = list(cache.tokens(0)[KEEP + gone :])
                cache.trim(0, held - KEEP)
                runner.prefill(0, recent)
        logits = runner.prefill_rows(0, tokens[begin : begin + 32]).astype(np.float64)
        highest = logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
        found.append(total - logits[np.arange(32), tokens[begin + 1 : begin + 33]])
    return np.concatenate(found)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(3600)
def test_twenty_thousand_tokens_through_a_cache_of_a_thousand_keep_memory_flat(smollm2_package: Path) -> None:
    engine = Engine.load(smollm2_package, options=msgspec.structs.replace(OPTIONS, max_context_tokens=1024))
    params = GenerationParams(
        max_tokens=20_000, min_tokens=20_000, temperature=1.0, top_p=0.95, seed=5, on_context_full="slide"
    )
    resident = {}
    count = 0
    for token in engine.generate("The lamplighter's diary.\n\nMonday.", params):
        if token.token_id is None:
            break
        count += 1
        assert engine.runner.cache.offset(0) <= 1024
        if count in {2_000, 20_000}:
            resident[count] = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    assert count == 20_000
    assert resident[20_000] - resident[2_000] < 8 * MIB
