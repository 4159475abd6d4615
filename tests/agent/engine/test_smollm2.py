from __future__ import annotations

from pathlib import Path

import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.package.chat_format import ChatMessage

pytestmark = pytest.mark.smollm2

QUESTION = [ChatMessage("user", "What is the capital of France?")]
GREEDY = GenerationParams(max_tokens=32, temperature=0.0)


def answer(engine: Engine) -> str:
    return "".join(token.text for token in engine.generate(QUESTION, GREEDY))


def test_real_weights_answer_and_chunks_do_not_change_it(smollm2_package: Path) -> None:
    answers = {
        answer(Engine.load(smollm2_package, options=EngineOptions(max_context_tokens=128, prefill_chunk_tokens=chunk)))
        for chunk in (8, 128)
    }
    assert len(answers) == 1
    assert "Paris" in answers.pop()
