from __future__ import annotations

from pathlib import Path

import msgspec
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


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_real_weights_say_the_same_with_speculation(smollm2_package: Path, temperature: float) -> None:
    engine = Engine.load(smollm2_package, options=EngineOptions(max_context_tokens=512))
    records = "Anna lives in Bremen and is 34. Bogdan lives in Novi Sad and is 51. Carla lives in Ravenna and is 29. "
    prompt = [ChatMessage("user", f"Repeat these sentences twice, word by word: {records}")]
    plain = GenerationParams(max_tokens=48, temperature=temperature, seed=5, speculation=False)
    expected = [token.token_id for token in engine.generate(prompt, plain)]
    for _ in range(2):
        *tokens, last = engine.generate(prompt, msgspec.structs.replace(plain, speculation=True))
        assert [token.token_id for token in tokens] == expected[:-1]
        assert last.finished is not None
        assert last.finished.timings.accepted_tokens <= last.finished.timings.drafted_tokens
