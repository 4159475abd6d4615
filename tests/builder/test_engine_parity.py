"""Packages of every family in our engine: the greedy tokens of transformers, and those of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_text_planned_across_the_switch_has_long_factors_from_its_start(checkpoint: Path, engine: Engine) -> None:
    prompt = PROMPTS[1]
    assert len(prompt) < LONG_ROPE_SWITCH < len(prompt) + 40
    params = GenerationParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    generated, _ = engine_tokens(engine, prompt, params)
    assert_greedy(load_reference(checkpoint), prompt, generated)


@pytest.mark.parametrize("family", LONG_ROPE, indirect=True)
def test_text_without_a_limit_is_planned_for_the_whole_context(checkpoint: Path, engine: Engine) -> None:
    params = GenerationParams(temperature=0.0, ignore_eos=True)
    generated, end = engine_tokens(engine, PROMPTS[0], params)
    assert (end.finish_reason, len(generated)) == ("length", CONTEXT - len(PROMPTS[0]))
    assert_greedy(load_reference(checkpoint), PROMPTS[0], generated)


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
