"""Packages of every family in our engine: the greedy tokens of transformers, and those of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import GenerationMixin

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_builder.parity import Reference
from lamplighter_builder.precision import PrecisionName
from support.engine_tokens import (
    CONTEXT,
    GENERATED,
    OPTIONS,
    PROMPTS,
    engine_tokens,
    genai_agrees,
    has_genai,
    tokens_together,
)
from support.families import FAMILIES, LONG_ROPE, LONG_ROPE_SWITCH, load_reference, write_family_checkpoint
from support.tiny_model import build_tiny_package


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("engine-parity") / family, family)


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_package(checkpoint, tmp_path_factory.mktemp("fp32") / "package", "fp32")


@pytest.fixture
def engine(package: Path) -> Iterator[Engine]:
    loaded = Engine.load(package, options=OPTIONS)
    yield loaded
    loaded.close()


def assert_greedy(reference: Reference, prompt: list[int], generated: list[int]) -> None:
    """One pass over prompt and text shows each step's choice; its factors are those of the final length."""
    logits = reference.logits(np.array([prompt + generated[:-1]], dtype=np.int64))
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == generated


def test_requests_together_get_the_tokens_of_transformers(checkpoint: Path, engine: Engine) -> None:
    torch.set_num_threads(2)
    reference = load_reference(checkpoint)
    found = tokens_together(engine, PROMPTS)
    assert all(len(generated) == GENERATED for generated in found)
    for prompt, generated in zip(PROMPTS, found, strict=True):
        assert_greedy(reference, prompt, generated)


@pytest.mark.genai
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_onnxruntime_genai_gives_our_tokens(precision: PrecisionName, checkpoint: Path, tmp_path: Path) -> None:
    if not has_genai():
        pytest.skip("onnxruntime-genai is not installed")
    assert genai_agrees(build_tiny_package(checkpoint, tmp_path / "package", precision))


def transformers_tokens(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of ``generate``, which computes its cache again where LongRoPE's short factors end."""
    model = load_reference(checkpoint).model
    assert isinstance(model, GenerationMixin)
    with torch.no_grad():
        found = model.generate(  # type: ignore[misc]
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert isinstance(found, torch.Tensor)
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
@pytest.mark.parametrize("length", [LONG_ROPE_SWITCH - 20, LONG_ROPE_SWITCH - 1, LONG_ROPE_SWITCH])
def test_text_across_the_switch_is_that_of_transformers(length: int, checkpoint: Path, engine: Engine) -> None:
    prompt = PROMPTS[2][:length]
    params = GenerationParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    assert engine_tokens(engine, prompt, params)[0] == transformers_tokens(checkpoint, prompt, 40)


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_text_without_a_limit_is_that_of_transformers_too(checkpoint: Path, engine: Engine) -> None:
    params = GenerationParams(temperature=0.0, ignore_eos=True)
    generated, end = engine_tokens(engine, PROMPTS[0], params)
    assert (end.finish_reason, len(generated)) == ("length", CONTEXT - len(PROMPTS[0]))
    assert generated == transformers_tokens(checkpoint, PROMPTS[0], len(generated))


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_requests_that_cross_the_switch_together_get_the_tokens_of_each_alone(engine: Engine) -> None:
    params = GenerationParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompts = [PROMPTS[2][start : start + length] for start, length in ((0, 50), (1, 60), (2, 20))]
    alone = [engine_tokens(engine, prompt, params)[0] for prompt in prompts]
    assert tokens_together(engine, tuple(prompts), params) == alone


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_keys_of_short_factors_are_not_reused_for_a_long_prompt(checkpoint: Path, engine: Engine) -> None:
    reference, whole = load_reference(checkpoint), PROMPTS[2]
    engine_tokens(engine, whole[:40])
    generated, end = engine_tokens(engine, whole)
    assert end.usage.cached_tokens == 0
    assert_greedy(reference, whole, generated)
    generated, end = engine_tokens(engine, whole[:45])
    assert end.usage.cached_tokens == 40
    assert_greedy(reference, whole[:45], generated)


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_pinned_prompt_that_outgrows_the_short_factors_is_left_out(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = msgspec.structs.replace(OPTIONS, pinned_prompts=("answer the question " * 30,))
    engine = Engine.load(package, options=options)
    assert "outgrows LongRoPE's short factors" in caplog.text
    assert engine.prefixes.nbytes == 0
    assert engine.runner.cache.offset(0) == 0
