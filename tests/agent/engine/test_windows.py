"""Windowed layers with buffers smaller than the context: the same tokens as with whole buffers, and as transformers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.memory import MIB, MachineMemory, plan_memory
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.windows import WindowedLayers, windowed_layers
from lamplighter_agent.errors import EngineError
from lamplighter_agent.package.manifest import Manifest, ModelFacts, decode_manifest
from support.engine_tokens import engine_tokens, tokens_together
from support.families import load_reference, write_family_checkpoint
from support.manifests import manifest_tree
from support.parity_depths import random_tokens
from support.tiny_model import build_tiny_package

CAPACITY = 288
"""Window and slack, in whole pages of the tiny models' rows."""
OPTIONS = EngineOptions(
    max_context_tokens=512, slots=3, threads=2, prefill_chunk_tokens=64, kv_cache_dtype="float32", speculation=False
)
GREEDY = GenerationParams(max_tokens=60, temperature=0.0, ignore_eos=True)
TEXT: list[int] = random_tokens(1, 512)[0].tolist()
PROMPTS = (TEXT[:250], TEXT[5:405], TEXT[9:49])
"""Decoding crosses the first eviction; several before; none."""


@pytest.fixture(scope="module", params=["gemma3_text", "gemma2", "mistral", "smollm3-yarn-windowed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of both kinds; of both kinds and with bounded scores; windowed ones alone; some whose keys do not turn."""
    return write_family_checkpoint(tmp_path_factory.mktemp("windows") / request.param, request.param)


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_package(checkpoint, tmp_path_factory.mktemp("windows-package") / "package", "fp32")


@pytest.fixture(scope="module")
def engine(package: Path) -> Engine:
    loaded = Engine.load(package, options=OPTIONS)
    windowed = loaded.runner.cache.spec.windowed
    assert windowed is not None
    rows = {index // 2: buffer.shape[2] for index, buffer in enumerate(loaded.runner.cache.buffers)}
    assert all((count < 512) == (layer in windowed.layers) for layer, count in rows.items())
    return loaded


@given(window=st.integers(16, 300), slack=st.integers(0, 300), tokens=st.integers(0, 2000))
def test_a_window_is_always_resident_and_goes_in_steps(window: int, slack: int, tokens: int) -> None:
    windowed = WindowedLayers((0,), window, window + slack)
    assert min(tokens, window) <= windowed.resident(tokens) <= min(tokens, windowed.capacity)
    assert windowed.first(tokens) % windowed.step == 0
    assert windowed.first(tokens) <= windowed.first(tokens + 1)


@pytest.mark.parametrize(("window", "context"), [(None, 4096), (8, 4096), (512, 768), (4096, 4096)])
def test_layers_keep_the_whole_context_where_a_window_saves_nothing(window: int | None, context: int) -> None:
    assert windowed_layers(facts(sliding_window=window), context) is None


def test_requests_together_get_the_tokens_of_transformers(checkpoint: Path, engine: Engine) -> None:
    reference = load_reference(checkpoint)
    for prompt, generated in zip(PROMPTS, tokens_together(engine, PROMPTS, GREEDY), strict=True):
        logits = reference.logits(np.array([prompt + generated[:-1]], dtype=np.int64))
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == generated


@pytest.mark.parametrize("shared", [100, 300, 399])
def test_a_prompt_goes_on_from_any_token_of_an_earlier_one(shared: int, engine: Engine) -> None:
    engine.forget_prefixes()
    earlier, prompt = TEXT[:400], TEXT[:shared] + TEXT[450:490]
    cold, _ = engine_tokens(engine, prompt, msgspec.structs.replace(GREEDY, cache_prompt=False))
    engine_tokens(engine, earlier, GREEDY)
    found, end = engine_tokens(engine, prompt, GREEDY)
    assert end.usage.cached_tokens == shared
    assert found == cold


@pytest.fixture(scope="module")
def rounding_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its 8-bit activations make tenths of a logit out of a last bit."""
    folder = tmp_path_factory.mktemp("windows-int4")
    package = build_tiny_package(write_family_checkpoint(folder / "gemma3_text", "gemma3_text"), folder / "p", "int4")
    return Engine.load(package, options=OPTIONS)


@pytest.mark.parametrize("shared", [38, 70, CAPACITY - 2, CAPACITY - 1, CAPACITY, 300])
def test_logits_are_the_same_bits_whatever_was_cached(shared: int, rounding_engine: Engine) -> None:
    prompt = TEXT[:shared] + TEXT[40 : 440 - shared]

    def chances(*, cached: bool) -> list[tuple[tuple[int, float], ...]]:
        params = GenerationParams(max_tokens=1, temperature=0.0, logprobs=5, cache_prompt=cached)
        return [found.top for token in rounding_engine.generate(prompt, params) for found in token.logprobs]

    rounding_engine.forget_prefixes()
    cold = chances(cached=False)
    engine_tokens(rounding_engine, TEXT[:shared] + TEXT[450:452], msgspec.structs.replace(GREEDY, max_tokens=1))
    assert chances(cached=True) == cold


def test_a_lone_token_behind_a_moved_window_has_the_bits_of_one_among_others(rounding_engine: Engine) -> None:
    shared = TEXT[: CAPACITY + 1]
    params = GenerationParams(max_tokens=1, temperature=0.0, logprobs=5)

    def chances(prompt: list[int], *, cached: bool) -> list[tuple[tuple[int, float], ...]]:
        asked = msgspec.structs.replace(params, cache_prompt=cached)
        return [found.top for token in rounding_engine.generate(prompt, asked) for found in token.logprobs]

    rounding_engine.forget_prefixes()
    longer = [shared + TEXT[start : start + 40] for start in range(40, 240, 20)]
    cold = [chances(prompt, cached=False) for prompt in longer]
    chances(shared, cached=True)
    _, end = engine_tokens(rounding_engine, longer[0], params)
    assert end.usage.cached_tokens == len(shared)
    assert [chances(prompt, cached=True) for prompt in longer] == cold


def test_an_answer_is_kept_too(engine: Engine) -> None:
    engine.forget_prefixes()
    first, _ = engine_tokens(engine, TEXT[:250], GREEDY)
    prompt = TEXT[:250] + first + TEXT[450:460]
    cold, _ = engine_tokens(engine, prompt, msgspec.structs.replace(GREEDY, cache_prompt=False))
    found, end = engine_tokens(engine, prompt, GREEDY)
    assert end.usage.cached_tokens == 250 + len(first) - 1
    assert found == cold


def test_several_answers_and_beams_go_on_from_one_prompt(package: Path, engine: Engine) -> None:
    whole = Engine.load(package, options=msgspec.structs.replace(OPTIONS, max_context_tokens=CAPACITY))
    assert whole.runner.cache.spec.windowed is None
    for params in (
        GenerationParams(max_tokens=20, temperature=1.0, n=3, seed=4, ignore_eos=True),
        GenerationParams(max_tokens=20, temperature=0.0, num_beams=3, ignore_eos=True),
    ):
        # The longest text that whole buffers of that many rows take, and one that goes beyond.
        assert answers(engine, TEXT[: CAPACITY - 20], params) == answers(whole, TEXT[: CAPACITY - 20], params)
        assert all(answers(engine, TEXT[: CAPACITY - 10], params))


def test_drafts_do_not_change_the_text(package: Path, engine: Engine) -> None:
    guessing = Engine.load(package, options=msgspec.structs.replace(OPTIONS, speculation=True))
    prompt = (TEXT[:30] * 10)[:265]
    params = msgspec.structs.replace(GREEDY, max_tokens=200)
    assert engine_tokens(guessing, prompt, params)[0] == engine_tokens(engine, prompt, params)[0]


def test_a_live_text_goes_back_behind_what_windows_keep(engine: Engine) -> None:
    with engine.open(TEXT[:250], GREEDY) as live:
        first = [item.token_id for item in live]
        live.rewind(240)
        live.append(TEXT[240:250])
        assert [item.token_id for item in live] == first


def test_keys_of_a_text_that_slid_are_those_that_would_be_computed(package: Path) -> None:
    slid, computed = (Engine.load(package, options=OPTIONS) for _ in range(2))
    cache, (keep, held) = slid.runner.cache, (8, 500)
    fill(slid, TEXT[:held])
    assert cache.spec.windowed is not None
    step = cache.spec.windowed.step
    assert (cache.evictable(0, keep, 10), cache.evictable(0, keep + 1, step + 1)) == (0, 0)
    gap = cache.evictable(0, 0, 10)
    assert gap == step * (cache.spec.windowed.first(held) >= step)
    cache.evict(0, 0, gap)
    fill(computed, TEXT[gap:held])
    assert cache.tokens(0) == computed.runner.cache.tokens(0)
    # Keys and values of the first layer depend on token and position alone.
    for index in (0, 1):
        moved, first = cache.resident(index, 0, 0, held - gap)
        fresh, other = computed.runner.cache.resident(index, 0, 0, held - gap)
        assert first == other
        np.testing.assert_allclose(moved, fresh, atol=2e-4)  # float32 angles of hundreds of positions


@pytest.mark.parametrize("keep", [0, 8])
def test_a_text_slides_through_a_full_context(keep: int, engine: Engine) -> None:
    params = msgspec.structs.replace(GREEDY, max_tokens=400, on_context_full="slide", keep_tokens=keep)
    generated, end = engine_tokens(engine, TEXT[:300], params)
    assert (len(generated), end.finish_reason) == (400, "length")


def test_an_int8_cache_keeps_windows_too(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    options = msgspec.structs.replace(OPTIONS, kv_cache_dtype="int8")
    coded = Engine.load(package, options=options)
    assert coded.plan.kv_window_bytes
    fill(coded, TEXT[:400])
    found = coded.runner.decode([TEXT[400]])[0].copy()
    expected = load_reference(checkpoint).logits(np.array([TEXT[:401]], dtype=np.int64))[0, -1]
    # What rounding to 8 bits costs; a window at a wrong place gives other logits altogether.
    assert np.corrcoef(found, expected)[0, 1] > 0.99


def test_slots_change_places_with_windows_that_were_moved() -> None:
    spec = CacheSpec(2, 1, 4, windowed=WindowedLayers((1,), 250, 256))
    cache = KVCache(spec, slots=2, capacity=400)
    for slot, tokens in enumerate((370, 260)):
        cache.advance(slot, range(tokens))
        for index, buffer in enumerate(cache.buffers):
            rows, first = cache.resident(index, slot, 0, tokens)
            rows[:] = (1000 * slot + np.arange(first, tokens))[None, :, None]
            assert rows.base is not None
            assert np.shares_memory(rows, buffer)
    cache.swap(0, 1)
    for slot, (tokens, origin) in enumerate(((260, 1000), (370, 0))):
        assert cache.offset(slot) == tokens
        for index in range(4):
            rows, first = cache.resident(index, slot, 0, tokens)
            assert first == (0 if index < 2 else tokens - spec.windowed.resident(tokens))  # type: ignore[union-attr]
            assert rows[0, :, 0].tolist() == list(range(origin + first, origin + tokens))
    assert cache.nbytes == spec.slot_bytes(260) + spec.slot_bytes(370) < 630 * spec.bytes_per_token


def test_what_windows_dropped_cannot_be_copied_and_is_trimmed_with_the_rest() -> None:
    cache = KVCache(CacheSpec(1, 1, 4, windowed=WindowedLayers((0,), 250, 256)), slots=2, capacity=400)
    cache.advance(0, range(290))
    assert (cache.reusable(0, 289), cache.reusable(0, 280)) == (289, 0)
    with pytest.raises(ValueError, match="slot 0 has dropped what windowed layers need of its first 280 tokens"):
        cache.copy(0, 1, 280)
    assert (cache.trim(0, 1), cache.offset(0)) == (1, 289)
    assert (cache.trim(0, 9), cache.offset(0)) == (289, 0)


def test_a_plan_with_windows_holds_a_longer_context() -> None:
    manifest = gemma3_1b()
    rooms = [
        plan_memory(manifest, MachineMemory(available_bytes=size * MIB, process_bytes=0), EngineOptions())
        for size in (1300, 1000, 700)
    ]
    assert [(plan.max_context_tokens, plan.slots) for plan in rooms[:2]] == [(4096, 4), (4096, 4)]
    assert rooms[0].kv_bytes_per_token == 4 * 2 * 256 * 4
    assert rooms[0].kv_window_bytes == 4 * 22 * 768 * 2 * 256 * 4
    assert all(plan.total_bytes + plan.headroom_bytes <= plan.budget_bytes for plan in rooms)
    whole = plan_memory(
        msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, sliding_window=None)),
        MachineMemory(available_bytes=1000 * MIB, process_bytes=0),
        EngineOptions(),
    )
    assert whole.kv_tokens < rooms[1].kv_tokens
    assert whole.kv_window_bytes == 0


def answers(engine: Engine, prompt: list[int], params: GenerationParams) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for item in engine.generate(prompt, params):
        found.setdefault(item.index, []).extend(item.token_ids)
    if not found:
        raise EngineError("nothing was generated")
    return [found[index] for index in sorted(found)]


def fill(engine: Engine, tokens: list[int]) -> None:
    for begin in range(0, len(tokens), 50):
        engine.runner.prefill(0, tokens[begin : begin + 50])


def facts(**changes: object) -> ModelFacts:
    tree = manifest_tree()
    tree["model"] |= changes
    return decode_manifest(msgspec.json.encode(tree)).model


def gemma3_1b() -> Manifest:
    tree = manifest_tree()
    tree["model"] |= {
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_layers": [layer for layer in range(26) if (layer + 1) % 6],
    }
    tree["memory"] = {
        "weights_bytes": 300 * MIB,
        "kv_bytes_per_token": {"float32": 26 * 2048},
        "prefill_scratch_bytes": 32 * MIB,
        "prefill_chunk_tokens": 512,
    }
    return decode_manifest(msgspec.json.encode(tree))
