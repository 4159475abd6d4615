"""The part of a prepared copy that computes prompts: kept where it is faster on this machine.

``prompts/`` in the copy's directory holds the model with float32 projections (``prompt_graph``) and its packed weights.
Whether that pays depends on the CPU's units and on how the package is quantized, so both models compute a prompt when
the copy is made, and the faster one computes prompts from then on.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Final

import numpy as np

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.external_data import align_external_data
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.prompt_graph import with_float_projections
from lamplighter_agent.engine.runner import ModelRunner
from lamplighter_agent.engine.session import ModelSession, save_prepacked
from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest

PROMPTS_NAME: Final = "prompts"

_TOKENS: Final = 128
"""Length of the prompt that is timed: a usual chunk."""

_CUT: Final = 3
"""Where it is cut to see that this makes no difference."""

_ROUNDS: Final = 5
_ENOUGH_S: Final = 20.0
"""No further round is begun after this; a large model on a small machine needs seconds for one."""

_LEAST_GAIN: Final = 1.15
"""The copy costs memory and disk space, and makes prompts of a few tokens slower."""


def write_prompt_copy(package: Path, directory: Path, *, threads: int) -> bool:
    """Write the model for prompts and its packed weights; return False, with nothing written, if it has none.

    Args:
        package: The package directory, whose operators were checked.
        directory: Where to write; made here.
        threads: Compute threads.

    Raises:
        PackageError: If the package's model cannot be read.
        EngineError: If memory runs out or the copy cannot be written.
        OSError: If the file system refuses.
    """
    edited = with_float_projections(memoryview((package / MODEL_NAME).read_bytes()))
    if edited is None:
        return False
    directory.mkdir()
    save_prepacked(package / MODEL_NAME, directory, threads=threads, edited=edited)
    align_external_data(directory / MODEL_NAME, directory / WEIGHTS_NAME)
    return True


def pays(copy: Path, manifest: Manifest, *, threads: int) -> bool:
    """Return whether the model in ``prompts/`` is clearly faster than the copy's own, and exact.

    Exact means here that the logits behind a prompt do not depend on how it was cut.

    Raises:
        EngineError: If the runtime fails.
    """
    tokens = [index * 31 % manifest.model.vocab_size for index in range(_prompt_tokens(manifest))]
    plain, prompts = (_open(directory, manifest, threads) for directory in (copy, copy / PROMPTS_NAME))
    whole = prompts.prefill(0, tokens)
    prompts.cache.trim(0, len(tokens))
    prompts.prefill(0, tokens[:_CUT])
    if not np.array_equal(prompts.prefill(0, tokens[_CUT:]), whole):
        return False
    plain_s, prompts_s, begun = math.inf, math.inf, time.perf_counter()
    for _ in range(_ROUNDS):
        plain_s = min(plain_s, _timed(plain, tokens))
        prompts_s = min(prompts_s, _timed(prompts, tokens))
        if time.perf_counter() - begun > _ENOUGH_S:
            break
    return plain_s > _LEAST_GAIN * prompts_s


def _prompt_tokens(manifest: Manifest) -> int:
    return min(_TOKENS, manifest.model.max_position_embeddings)


def _open(directory: Path, manifest: Manifest, threads: int) -> ModelRunner:
    cache = KVCache(CacheSpec.from_model(manifest.model), slots=1, capacity=_prompt_tokens(manifest))
    return ModelRunner(ModelSession(directory / MODEL_NAME, manifest, threads=threads), cache)


def _timed(runner: ModelRunner, tokens: list[int]) -> float:
    """Return the seconds of a prompt in an empty slot; the slot is emptied before."""
    runner.cache.trim(0, len(tokens))
    begun = time.perf_counter()
    runner.prefill(0, tokens)
    return time.perf_counter() - begun
