"""What a build learns by running its model: scales for an 8-bit cache, self-tests, fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.fidelity import Fidelity
from lamplighter_agent.package.manifest import CacheScales, GenerationDefaults, ModelFacts, SelfTest
from lamplighter_builder.cache_scales import calibrate_cache, takes_8_bit_cache
from lamplighter_builder.evaluation import Reference
from lamplighter_builder.generation import PROMPTS, Answer, compare_answers, encode_prompt, generate_answers
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.calibration import TokenArray
from lamplighter_builder.runner import Runner
from lamplighter_builder.self_test import load_runner, make_self_tests
from lamplighter_builder.targets import GraphTarget


@dataclass(frozen=True, slots=True)
class Subject:
    """A written model and what is known of it; ``windows`` are tokens of calibration text, int64 [windows, tokens]."""

    model: Path
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    generation: GenerationDefaults
    facts: ModelFacts
    target: GraphTarget
    windows: TokenArray


@dataclass(frozen=True, slots=True)
class Examination:
    """Findings for the manifest; those of a model that does not run here are empty."""

    cache_scales: CacheScales | None = None
    self_tests: tuple[SelfTest, ...] = ()
    fidelity: Fidelity | None = None


OpenReference = Callable[[Sequence[Answer]], Reference | None]
"""From a package's answers to what they and the package are compared with, or None without a comparison."""


def examine(subject: Subject, open_reference: OpenReference | None, progress: Progress) -> Examination:
    """Run a model.

    Args:
        subject: The model.
        open_reference: Runs what it is compared with; None: it is not compared.
        progress: Hears of the work.

    Raises:
        BuildError: If onnxruntime cannot load it.
    """
    facts = subject.facts
    runner = load_runner(subject.model, progress)
    scales: CacheScales | None = None
    if subject.target.cache_dtype == "float32" and takes_8_bit_cache(facts):
        progress.stage("cache scales", 1)
        scales = calibrate_cache(runner, subject.tokenizer, facts, subject.windows)
        progress.advance(1)
    self_tests = make_self_tests(
        runner,
        subject.tokenizer,
        subject.chat_format,
        subject.generation,
        facts,
        progress,
    )
    fidelity = None if open_reference is None else _compare(subject, runner, open_reference, scales, progress)
    return Examination(scales, self_tests, fidelity)


def _compare(
    subject: Subject, runner: Runner, open_reference: OpenReference, scales: CacheScales | None, progress: Progress
) -> Fidelity | None:
    prompts = [encode_prompt(prompt, subject.tokenizer, subject.chat_format) for prompt in PROMPTS]
    eos, context = frozenset(subject.generation.eos_token_ids), subject.facts.max_position_embeddings
    answers = generate_answers(runner, prompts, eos, context, progress)
    # Neither the package nor the checkpoint is small beside the other.
    runner.unload()
    reference = open_reference(answers)
    if reference is None:
        return None
    return reference.compare(runner, compare_answers(answers, reference.choices), scales, progress)
