"""Prompts on an int8 cache: from unpacked keys and values, with the decode steps and codes of the cache as it was."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.runner import ModelRunner
from lamplighter_agent.engine.session import ModelSession
from lamplighter_agent.package.layout import MODEL_NAME
from lamplighter_agent.package.manifest import Manifest, read_manifest
from support.engine_tokens import engine_tokens, tokens_together
from support.families import write_family_checkpoint
from support.parity_depths import random_tokens
from support.tiny_model import build_tiny_package

OPTIONS = EngineOptions(max_context_tokens=256, slots=3, threads=2, prefill_chunk_tokens=32, kv_cache_dtype="int8")
GREEDY = GenerationParams(max_tokens=20, temperature=0.0, ignore_eos=True)
TEXT: list[int] = random_tokens(1, 200)[0].tolist()


def runner(model: Path, manifest: Manifest, *, unpack: bool) -> ModelRunner:
    """A runner on an empty int8 cache."""
    spec = CacheSpec.from_model(manifest.model, "int8")
    session = ModelSession(model, manifest, threads=2, cache=spec, unpack=unpack)
    return ModelRunner(session, KVCache(spec, slots=2, capacity=256))


@pytest.fixture(
    scope="module",
    params=["llama", "qwen3", "phi", "phi3-longrope", "gemma2", "smollm3"],
)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed projections; normed heads; heads rotated in part; two sets of factors; bounded scores and windows; layers
    without rotation."""
    folder = tmp_path_factory.mktemp("unpacked")
    return build_tiny_package(write_family_checkpoint(folder / request.param, request.param), folder / "p", "int4")


@pytest.fixture(scope="module")
def runners(package: Path) -> tuple[ModelRunner, ModelRunner]:
    """One that unpacks, and one that reads codes."""
    manifest = read_manifest(package)
    return runner(package / MODEL_NAME, manifest, unpack=True), runner(package / MODEL_NAME, manifest, unpack=False)


def fill(one: ModelRunner, slot: int, lengths: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Compute as many tokens of the text in pieces of these lengths; return the logits behind the last."""
    one.cache.release(slot)
    one.cache.plan(slot, sum(lengths))
    rows = []
    for length in lengths:
        done = one.cache.offset(slot)
        rows.append(one.prefill(slot, TEXT[done : done + length]))
    return rows[-1]


def test_the_first_layers_codes_are_those_of_the_operator_itself(runners: tuple[ModelRunner, ModelRunner]) -> None:
    unpacking, reading = runners
    for one in runners:
        fill(one, 1, [40, 23])
    for kind in (0, 1):
        found, expected = (one.cache.buffers[kind][1, :, :63].astype(int) for one in (unpacking, reading))
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.01


def test_logits_are_those_of_the_codes(runners: tuple[ModelRunner, ModelRunner]) -> None:
    unpacking, reading = (fill(one, 0, [60]) for one in runners)
    # Both round, but the operator lets a prompt see its own keys before it rounds them.
    assert np.corrcoef(unpacking, reading)[0, 1] > 0.98


@pytest.mark.parametrize("lengths", [[30, 30], [2, 58], [17, 3, 40], [58, 2]])
def test_a_prompt_has_the_same_bits_however_it_is_cut(
    lengths: list[int], runners: tuple[ModelRunner, ModelRunner]
) -> None:
    unpacking = runners[0]
    whole = fill(unpacking, 0, [60])
    codes = [buffer[0, :, :60].copy() for buffer in unpacking.cache.buffers]
    assert np.array_equal(fill(unpacking, 1, lengths), whole)
    assert all(
        np.array_equal(buffer[1, :, :60], code) for buffer, code in zip(unpacking.cache.buffers, codes, strict=True)
    )


def test_decode_steps_are_those_of_the_cache_as_it_was(runners: tuple[ModelRunner, ModelRunner]) -> None:
    unpacking, reading = runners
    for slot in (0, 1):
        for one in runners:
            fill(one, slot, [30 + slot])
        for buffer, other in zip(unpacking.cache.buffers, reading.cache.buffers, strict=True):
            buffer[slot] = other[slot]
    for tokens in ([5, 6], [7, 8]):
        assert np.array_equal(unpacking.decode(tokens), reading.decode(tokens))


def test_an_engine_gives_the_same_text_together_cached_and_cold(package: Path) -> None:
    engine = Engine.load(package, options=OPTIONS)
    assert engine.runner.unpacks
    assert (
        engine.plan.unpacked_bytes
        == 24 * 256 * engine.manifest.model.num_key_value_heads * engine.manifest.model.head_dim
    )
    prompts = (TEXT[:60], TEXT[5:50], TEXT[:44] + TEXT[100:120])
    cold = [engine_tokens(engine, prompt, msgspec.structs.replace(GREEDY, cache_prompt=False))[0] for prompt in prompts]
    engine_tokens(engine, prompts[0], GREEDY)
    found, end = engine_tokens(engine, prompts[2], GREEDY)
    assert (found, end.usage.cached_tokens) == (cold[2], 44)
    assert tokens_together(engine, prompts, GREEDY) == cold
    engine.close()


def test_attention_with_sinks_is_left_as_it_is(tiny_package: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_package / MODEL_NAME)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (11 - len(node.input)) + ["sinks"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4, dtype=np.float32), "sinks"))
    onnx.save(model, tmp_path / MODEL_NAME)
    one = runner(tmp_path / MODEL_NAME, read_manifest(tiny_package), unpack=True)
    assert not one.unpacks
    assert np.isfinite(fill(one, 0, [30, 30])).all()


def test_a_float32_cache_has_nothing_to_unpack(tiny_package: Path) -> None:
    engine = Engine.load(tiny_package, options=msgspec.structs.replace(OPTIONS, kv_cache_dtype="float32"))
    assert (engine.runner.unpacks, engine.plan.unpacked_bytes) == (False, 0)
    engine.close()
