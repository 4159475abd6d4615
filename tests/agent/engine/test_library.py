"""The engine in the hands of a program that does not know it: other prompts, several threads, no clean-up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prompts import Prompt
from lamplighter_agent.errors import ConfigError, EngineError, RequestError
from lamplighter_agent.package.chat_format import ChatMessage

OPTIONS = EngineOptions(max_context_tokens=256, slots=3, threads=2, prefill_chunk_tokens=16)
GREEDY = GenerationParams(max_tokens=24, temperature=0.0, ignore_eos=True)
QUESTION = [ChatMessage("user", "What is the capital of France?")]


@pytest.fixture(scope="module")
def engine(tiny_package: Path) -> Iterator[Engine]:
    with Engine.load(str(tiny_package), options=OPTIONS) as loaded:
        yield loaded


def text_of(engine: Engine, prompt: object, params: GenerationParams = GREEDY) -> str:
    return "".join(token.text for token in engine.generate(cast("Prompt", prompt), params))


def test_messages_may_be_dictionaries(engine: Engine) -> None:
    asked: list[dict[str, str]] = [{"role": "user", "content": "What is the capital of France?"}]
    assert engine.encode_prompt(asked) == engine.encode_prompt(QUESTION)
    assert engine.apply_chat_format(asked) == engine.apply_chat_format(QUESTION)
    with engine.open(asked) as live:
        assert live.tokens == engine.encode_prompt(QUESTION)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "it is a NoneType"),
        (b"The lamp", "it is a bytes"),
        ({"role": "user", "content": "Hi"}, "it is a dict"),
        (7, "it is a int"),
        ([QUESTION[0], "Hi"], "mixes messages"),
        (["Hi"], "holds something else"),
        ([{"role": "user"}], "message 0 has None for content, not a text"),
        ([ChatMessage("user", 3)], "message 0 has 3 for content, not a text"),  # type: ignore[arg-type]
        ([{"role": "user", "content": "Hi", "name": "Ann"}], "message 0 has 'name' besides role and content"),
        ("half \ud83d", "half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_refused(engine: Engine, prompt: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        text_of(engine, prompt)


def test_options_are_generation_params(engine: Engine) -> None:
    options: Any = {"max_tokens": 3}
    with pytest.raises(RequestError, match="params is a dict, but must be GenerationParams"):
        engine.generate("The lamp", options)


def test_threads_get_what_each_would_get_alone(engine: Engine) -> None:
    prompts = [f"{number} lamps on the harbour wall" for number in range(6)]
    alone = [text_of(engine, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: text_of(engine, prompt), prompts, timeout=60))
    assert together == alone


def test_a_live_text_shares_the_engine_with_other_threads(engine: Engine) -> None:
    alone = text_of(engine, "The lamp")

    def drive(_: int) -> str:
        with engine.open("The lamp", GREEDY) as live:
            return "".join(token.text for token in live)

    with ThreadPoolExecutor(3) as pool:
        other = pool.submit(text_of, engine, "Other words")
        assert list(pool.map(drive, range(2), timeout=60)) == [alone, alone]
        assert other.result(timeout=60) == text_of(engine, "Other words")


def test_live_texts_that_are_dropped_give_their_slots_back(engine: Engine) -> None:
    for _ in range(OPTIONS.slots or 0):
        engine.open("The lamp").next()
        gc.collect()
    assert text_of(engine, "The lamp")


def test_a_closed_engine_says_so(tiny_package: Path) -> None:
    engine = Engine.load(tiny_package, options=OPTIONS)
    running = engine.generate("The lamp", GREEDY)
    next(running)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        list(running)
    for call in (lambda: engine.generate("Hi"), lambda: engine.open("Hi"), lambda: engine.embed("Hi")):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 2}, "options is a dict, but must be EngineOptions"),
        (EngineOptions(threads="2"), r"not of its type: .*\$\.threads"),  # type: ignore[arg-type]
        (EngineOptions(kv_cache_dtype="q4"), r"not of its type: .*\$\.kv_cache_dtype"),  # type: ignore[arg-type]
        (EngineOptions(slots=0), "slots is 0, but must be 1 to 64"),
    ],
)
def test_options_of_the_engine_are_checked(tiny_package: Path, options: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine.load(tiny_package, options=cast("EngineOptions", options))
