"""What a build learns by running its model: scales for an 8-bit cache, self-tests, fidelity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.manifest import CacheScales, Fidelity, GenerationDefaults, ModelFacts, SelfTest
from lamplighter_builder.cache_scales import calibrate_cache
from lamplighter_builder.evaluation import Reference
from lamplighter_builder.progress import Progress
from lamplighter_builder.self_test import load_runner, make_self_tests
from lamplighter_builder.targets import GraphTarget


@dataclass(frozen=True, slots=True)
class Subject:
    """A written model and what is known of it."""

    model: Path
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    generation: GenerationDefaults
    facts: ModelFacts
    target: GraphTarget


@dataclass(frozen=True, slots=True)
class Examination:
    """Findings for the manifest; those of a model that does not run here are empty."""

    cache_scales: CacheScales | None = None
    self_tests: tuple[SelfTest, ...] = ()
    fidelity: Fidelity | None = None


def examine(subject: Subject, reference: Reference | None, progress: Progress) -> Examination:
    """Run a model.

    Args:
        subject: The model.
        reference: What it is compared with, or None.
        progress: Hears of the work.

    Raises:
        BuildError: If onnxruntime cannot load it.
    """
    facts = subject.facts
    runner = load_runner(subject.model, progress)
    scales: CacheScales | None = None
    if subject.target.cache_dtype == "float32":
        progress.stage("cache scales", 1)
        scales = calibrate_cache(runner, subject.tokenizer, facts)
        progress.advance(1)
    self_tests = make_self_tests(
        runner,
        subject.tokenizer,
        subject.chat_format,
        subject.generation,
        progress,
        short_rope_tokens=None if facts.rope is None else facts.rope.original_max_position_embeddings,
    )
    return Examination(scales, self_tests, None if reference is None else reference.compare(runner, progress))
