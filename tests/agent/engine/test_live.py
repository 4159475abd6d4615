"""The library's token loop: continue, go back, change options, choose tokens, converse; always as a fresh run would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.history import TokenIds
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import ContextOverflowError, RequestError
from lamplighter_agent.package.chat_format import ChatMessage

GREEDY = GenerationParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SEEDED = GenerationParams(max_tokens=12, temperature=1.0, seed=21, ignore_eos=True)
PROMPT = list(range(3, 60))
MORE = list(range(100, 130))


@pytest.fixture(scope="module")
def engine(tiny_package: Path) -> Iterator[Engine]:
    options = EngineOptions(max_context_tokens=256, slots=3, threads=1, prefill_chunk_tokens=16)
    loaded = Engine.load(tiny_package, options=options)
    yield loaded
    loaded.close()


def cold(engine: Engine, prompt: list[int], params: GenerationParams) -> list[int]:
    """Return the tokens of a fresh request."""
    return [token for item in engine.generate(prompt, params) for token in item.token_ids]


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of tokens of every prefill is added from now on."""
    counts: list[int] = []
    prefill = engine.runner.prefill

    def counting(slot: int, tokens: list[int]) -> NDArray[np.float32]:
        counts.append(len(tokens))
        return prefill(slot, tokens)

    monkeypatch.setattr(engine.runner, "prefill", counting)
    return counts


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
def test_a_loop_draws_what_a_request_gets(engine: Engine, params: GenerationParams) -> None:
    with engine.open(PROMPT, params) as live:
        items = list(live)
        assert live.tokens == PROMPT + [item.token_id for item in items]
    assert [item.token_id for item in items] == cold(engine, PROMPT, params)
    assert [item.finish_reason for item in items] == [None] * 11 + ["length"]
    text = "".join(token.text for token in engine.generate(PROMPT, params))
    assert "".join(item.text for item in items).strip("\ufffd") == text.strip("\ufffd")


def test_a_text_goes_on_without_computing_it_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.open(PROMPT, GREEDY) as live:
        first = [item.token_id for item in live]
        counts = computed(engine, monkeypatch)
        live.append(MORE)
        second = [item.token_id for item in live]
    # The last token drawn was not computed yet; then one a step.
    assert sum(counts) == 1 + len(MORE) + 11
    assert second == cold(engine, [*PROMPT, *first, *MORE], GREEDY)


@pytest.mark.parametrize("length", [len(PROMPT) + 5, len(PROMPT), 20, 1])
def test_a_rewound_text_goes_on_as_a_cold_one(engine: Engine, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    with engine.open(PROMPT, GREEDY) as live:
        whole = PROMPT + [item.token_id for item in live]
        counts = computed(engine, monkeypatch)
        live.rewind(length)
        again = [item.token_id for item in live]
    assert sum(counts) == min(2, length) + 11
    assert again == cold(engine, whole[:length], GREEDY)


def test_options_change_in_the_loop(engine: Engine) -> None:
    with engine.open(PROMPT, GREEDY) as live:
        first = live.next().token_id
        banned = msgspec.structs.replace(GREEDY, logit_bias={first: -100.0, 77: 100.0})
        live.params = banned
        assert [live.next().token_id for _ in range(3)] == [77, 77, 77]
        live.params = msgspec.structs.replace(banned, no_repeat_ngram_size=1)
        assert live.next().token_id != 77
        with pytest.raises(RequestError, match="temperature is -1") as caught:
            live.params = GenerationParams(temperature=-1.0)
        assert caught.value.param == "temperature"
        assert live.params.no_repeat_ngram_size == 1


def test_draws_go_on_over_a_change_of_options_and_begin_anew_with_another_seed(engine: Engine) -> None:
    expected = cold(engine, PROMPT, SEEDED)
    with engine.open(PROMPT, SEEDED) as live:
        first = [live.next().token_id for _ in range(4)]
        live.params = msgspec.structs.replace(SEEDED, logprobs=2)
        rest = [live.next() for _ in range(4)]
        assert first + [item.token_id for item in rest] == expected[:8]
        assert rest[0].logprob is not None
        assert len(rest[0].logprob.top) == 2
        live.rewind(len(PROMPT))
        live.params = msgspec.structs.replace(SEEDED, seed=22)
        live.params = SEEDED
        assert [live.next().token_id for _ in range(4)] == first


def test_logits_are_shown_and_a_token_of_ones_own_is_taken(engine: Engine) -> None:
    with engine.open(PROMPT, GREEDY) as live:
        logits = live.logits()
        second = int(np.argsort(logits)[-2])
        assert logits.shape == (engine.tokenizer.vocab_size,)
        live.accept(second)
        following = [live.next().token_id for _ in range(5)]
    assert following == cold(engine, [*PROMPT, second], GREEDY)[:5]


def test_a_scorer_that_raises_ends_its_own_request_and_no_other(engine: Engine) -> None:
    def broken(_tokens: object, _logits: object) -> None:
        raise KeyError("no such thing")

    other = engine.generate(PROMPT, SEEDED)
    next(other)
    with pytest.raises(RequestError, match="the scorer raised KeyError: 'no such thing'") as caught:
        list(engine.generate(PROMPT, SEEDED, scorer=broken))
    assert (caught.value.code, caught.value.param) == (400, "scorer")
    assert list(other)[-1].finished is not None
    with engine.open(PROMPT, SEEDED, scorer=broken) as live, pytest.raises(RequestError) as raised:
        live.next()
    assert isinstance(raised.value.__cause__, KeyError)
    assert engine.scheduler.idle


def test_a_scorer_takes_part_in_requests_and_loops(engine: Engine) -> None:
    seen: list[int] = []

    def only_even(tokens: TokenIds, logits: NDArray[np.float32]) -> None:
        seen.append(tokens.size)
        logits[1::2] = -np.inf

    drawn = [token for item in engine.generate(PROMPT, SEEDED, scorer=only_even) for token in item.token_ids]
    assert all(token % 2 == 0 for token in drawn)
    assert seen == list(range(len(PROMPT), len(PROMPT) + 12))
    with engine.open(PROMPT, SEEDED, scorer=only_even) as live:
        assert [item.token_id for item in live] == drawn


def test_a_conversation_goes_on_as_its_whole_rendering_would(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = [ChatMessage("system", "Be brief."), ChatMessage("user", "hello")]
    params = msgspec.structs.replace(GREEDY, max_tokens=6)
    with engine.open(opening, params) as live:
        answer = "".join(item.text for item in live) + live.flush()
        counts = computed(engine, monkeypatch)
        live.append_messages([ChatMessage("user", "and again <|im_end|>")])
        before = live.tokens
        list(live)
        conversation = [*opening, ChatMessage("assistant", answer), ChatMessage("user", "and again <|im_end|>")]
    whole = engine.tokenizer.decode(engine.encode_prompt(conversation))
    assert engine.tokenizer.decode(before) == whole
    assert before[-3:] == engine.encode_prompt(conversation)[-3:]
    assert sum(counts) < len(before)


def test_a_grammar_goes_back_with_the_text_and_starts_anew_for_the_next_answer(engine: Engine) -> None:
    params = GenerationParams(temperature=1.0, seed=1, guided_regex="[0-9]{4}", max_tokens=10)
    with engine.open(PROMPT, params) as live:
        assert len("".join(item.text for item in live)) == 4
        live.rewind(len(live) - 2)
        live.params = msgspec.structs.replace(params, temperature=0.5)
        assert len("".join(item.text for item in live)) == 2
        live.append(" then ")
        assert "".join(item.text for item in live).isdigit()


def test_a_stop_text_ends_the_answer_and_a_stop_token_is_no_part_of_the_text(engine: Engine) -> None:
    first = cold(engine, PROMPT, GREEDY)
    with engine.open(PROMPT, msgspec.structs.replace(GREEDY, stop_token_ids=(first[3],))) as live:
        items = list(live)
        assert items[-1].finish_reason == "stop"
        assert live.tokens == PROMPT + first[: first.index(first[3])]


def test_slots_are_lent_and_given_back(engine: Engine) -> None:
    one, two = engine.open(PROMPT, GREEDY), engine.open(MORE, GREEDY)
    with pytest.raises(RequestError, match="live sequences hold the slots that it needs"):
        engine.generate(PROMPT, msgspec.structs.replace(SEEDED, n=2))
    beside = cold(engine, PROMPT, GREEDY)
    assert [item.token_id for item in one] == beside
    one.close()
    three = engine.open(MORE, GREEDY)
    running = engine.generate(PROMPT, GREEDY)
    next(running)
    with pytest.raises(RequestError, match="all 3 slots of the memory plan are in use"):
        engine.open(MORE, GREEDY)
    running.close()
    assert [item.token_id for item in three] == [item.token_id for item in two] == cold(engine, MORE, GREEDY)
    for live in (one, two, three):
        live.close()
    assert engine.scheduler.used_tokens == 0
    with pytest.raises(RequestError, match="is closed"):
        one.next()


def test_the_end_of_the_context_ends_the_answer(engine: Engine) -> None:
    with engine.open(PROMPT, msgspec.structs.replace(GREEDY, max_tokens=None), max_context_tokens=64) as live:
        items = list(live)
        assert (len(live), items[-1].finish_reason) == (64, "length")
        with pytest.raises(ContextOverflowError, match="64 tokens and is to have 1 more, but its context is 64"):
            live.next()


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (GenerationParams(n=2), "n"),
        (GenerationParams(num_beams=2), "num_beams"),
        (GenerationParams(echo=True), "echo"),
        (GenerationParams(on_context_full="slide"), "on_context_full"),
    ],
)
def test_options_of_whole_requests_are_refused(engine: Engine, params: GenerationParams, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.open(PROMPT, params)
    assert caught.value.param == param
    assert engine.scheduler.used_tokens == 0


def test_an_empty_text_has_no_next_token(engine: Engine) -> None:
    with engine.open() as live, pytest.raises(RequestError, match="append something first"):
        live.next()


def test_going_back_beyond_the_beginning_is_refused(engine: Engine) -> None:
    with engine.open(PROMPT) as live, pytest.raises(RequestError, match="length is 58, but must be 0 to 57"):
        live.rewind(58)
