"""Greedy tokens of a package, from our engine and from onnxruntime-genai."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Final

from lamplighter_agent.engine.events import Finished
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from support.parity_depths import random_tokens

GENERATED: Final = 12
CONTEXT: Final = 256
OPTIONS: Final = EngineOptions(max_context_tokens=CONTEXT, slots=3, threads=2, prefill_chunk_tokens=16)
GREEDY: Final = GenerationParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)

PROMPTS: Final[tuple[list[int], ...]] = tuple(random_tokens(1, length)[0].tolist() for length in (11, 40, 100))
"""Inside every window; beyond it; past LongRoPE's switch."""


def engine_tokens(engine: Engine, prompt: list[int], params: GenerationParams = GREEDY) -> tuple[list[int], Finished]:
    """Return what our engine generates, and how it ended."""
    items = list(engine.generate(prompt, params))
    end = items[-1].finished
    assert end is not None
    return [item.token_id for item in items if item.token_id is not None], end


def tokens_together(
    engine: Engine, prompts: tuple[list[int], ...], params: GenerationParams = GREEDY
) -> list[list[int]]:
    """Return what our engine generates for prompts by turns, so that they are decoded in one batch."""
    streams = [engine.generate(prompt, params) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for items in zip(*streams, strict=True):
        for tokens, item in zip(found, items, strict=True):
            if item.token_id is not None:
                tokens.append(item.token_id)
    return found


def has_genai() -> bool:
    """Tell whether onnxruntime-genai is installed."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def genai_agrees(package: Path) -> bool:
    """Tell whether onnxruntime-genai generates our engine's tokens for every prompt, up to an end token."""
    genai = importlib.import_module("onnxruntime_genai")
    ours, theirs = Engine.load(package, options=OPTIONS), genai.Model(str(package))
    ends = ours.manifest.generation.eos_token_ids
    for prompt in PROMPTS:
        parameters = genai.GeneratorParams(theirs)
        parameters.set_search_options(max_length=CONTEXT, do_sample=False)
        generator = genai.Generator(theirs, parameters)
        generator.append_tokens(prompt)
        found: list[int] = []
        while len(found) < GENERATED and not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        generated, _ = engine_tokens(ours, prompt)
        if found != generated[: len(found)] or (len(found) < GENERATED and found[-1] not in ends):
            return False
    return True
