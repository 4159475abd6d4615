"""Self-tests: prompts with the greedy tokens that the builder saw, by which a device tries a new package."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.manifest import GenerationDefaults, ModelFacts, SelfTest
from lamplighter_builder.generation import encode_prompt
from lamplighter_builder.progress import Progress
from lamplighter_builder.runner import Runner

_PROMPTS: Final = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
)
_TOKENS: Final = 16
_CLEAR_MARGIN: Final = 0.5
"""Logits by which a token must lead for another CPU's kernels to be expected to choose it too."""


def load_runner(model: Path, progress: Progress) -> Runner:
    """Load a written model, once for everything that the builder runs on it.

    Raises:
        BuildError: If onnxruntime cannot load the model.
    """
    progress.stage("loading", 1)
    runner = Runner(model)
    progress.advance(1)
    return runner


def make_self_tests(
    runner: Runner,
    tokenizer: Tokenizer,
    chat_format: ChatFormat | None,
    generation: GenerationDefaults,
    facts: ModelFacts,
    progress: Progress,
) -> tuple[SelfTest, ...]:
    """Run a written model on a few prompts and keep its greedy tokens.

    Prompts are cut to half of the model's ``max_position_embeddings``, and answers end with it.
    """
    context = facts.max_position_embeddings
    short_rope_tokens = None if facts.rope is None else facts.rope.original_max_position_embeddings
    progress.stage("self-test", len(_PROMPTS))
    tests = []
    for prompt in _PROMPTS:
        tokens = encode_prompt(prompt, tokenizer, chat_format)[: context // 2]
        count = min(_TOKENS, context - len(tokens))
        greedy = runner.greedy(tokens, count, frozenset(generation.eos_token_ids), short_rope_tokens=short_rope_tokens)
        unclear = [index for index, chosen in enumerate(greedy) if chosen.margin < _CLEAR_MARGIN]
        tests.append(
            SelfTest(
                prompt_tokens=tuple(tokens),
                expected_tokens=tuple(chosen.token for chosen in greedy),
                min_matching_tokens=unclear[0] if unclear else len(greedy),
            )
        )
        progress.advance(1)
    return tuple(tests)
