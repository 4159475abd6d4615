"""Embeddings against transformers' hidden states on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.scheduler import Scheduler
from lamplighter_agent.errors import ContextOverflowError, RequestError
from support.tiny_model import build_tiny_package, write_tiny_checkpoint
from support.toy_engine import DEFAULTS, VOCAB_SIZE, ChecksumRunner, byte_level_tokenizer, memory_plan

LONG = [(7 * place) % 350 + 3 for place in range(50)]


@pytest.fixture(scope="module")
def model_and_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engine]]:
    directory = tmp_path_factory.mktemp("embeddings")
    checkpoint = write_tiny_checkpoint(directory / "checkpoint")
    package: Path = build_tiny_package(checkpoint, directory / "package", "fp32")
    options = EngineOptions(max_context_tokens=64, slots=2, threads=1, prefill_chunk_tokens=16)
    engine = Engine.load(package, options=options)
    yield LlamaForCausalLM.from_pretrained(checkpoint), engine
    engine.close()


def theirs(model: Any, tokens: list[int]) -> NDArray[np.float32]:  # noqa: ANN401
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0].mean(dim=0).numpy()
    vector: NDArray[np.float32] = hidden / np.linalg.norm(hidden)
    return vector


@pytest.mark.parametrize("tokens", [[5], [5, 6, 7], LONG])
def test_an_embedding_is_the_mean_of_the_last_hidden_states(
    model_and_engine: tuple[Any, Engine], tokens: list[int]
) -> None:
    model, engine = model_and_engine
    assert engine.embed(tokens) == pytest.approx(theirs(model, tokens), abs=1e-4)
    assert engine.scheduler.used_tokens == 0


def test_an_embedding_beside_a_generation_disturbs_neither(model_and_engine: tuple[Any, Engine]) -> None:
    engine = model_and_engine[1]
    params = GenerationParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    alone = [token.token_id for token in engine.generate([5, 6], params)]
    running = engine.generate([5, 6], params)
    beside = [next(running).token_id]
    vector = engine.embed(LONG)
    beside += [token.token_id for token in running]
    assert beside == alone
    assert vector == pytest.approx(engine.embed(LONG), abs=1e-6)


def test_a_text_beyond_the_context_is_refused(model_and_engine: tuple[Any, Engine]) -> None:
    with pytest.raises(ContextOverflowError, match="the prompt has 64 tokens"):
        model_and_engine[1].embed([5] * 64)


def test_a_package_without_hidden_states_gives_no_embeddings() -> None:
    plan = memory_plan()
    scheduler = Scheduler(
        ChecksumRunner(plan),
        Intake(byte_level_tokenizer(), defaults=DEFAULTS, plan=plan, vocab_size=VOCAB_SIZE),
        plan=plan,
        max_queued_requests=4,
    )
    with pytest.raises(RequestError, match="gives no embeddings") as caught:
        scheduler.submit_embedding("a", [1, 2])
    assert caught.value.hint == "build it again with this version of the builder"
    assert scheduler.idle
