"""Beam search against transformers' on the same weights, and its rules without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

from lamplighter_agent.engine.beam import BeamRules, BeamSearch, place_beams
from lamplighter_agent.engine.events import Choice
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError
from support.tiny_model import build_tiny_package, write_tiny_checkpoint

Models = tuple[Any, Engine]

PROMPT = [7, 30, 99, 12, 200]
# Enough of the vocabulary that beams of different lengths end.
STOPS = tuple(range(3, 384, 8))
LENGTH = 14


@pytest.fixture(scope="module")
def model_and_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    directory = tmp_path_factory.mktemp("beams")
    checkpoint = write_tiny_checkpoint(directory / "checkpoint")
    package = build_tiny_package(checkpoint, directory / "package", "fp32")
    engine = Engine.load(package, options=EngineOptions(max_context_tokens=64, slots=5, threads=1))
    yield LlamaForCausalLM.from_pretrained(checkpoint), engine
    engine.close()


def ours(engine: Engine, **options: object) -> list[tuple[list[int], float]]:
    """Return tokens without a final stop token, and score of each result."""
    params = msgspec.structs.replace(GenerationParams(max_tokens=LENGTH, stop_token_ids=STOPS), **options)
    tokens: dict[int, list[int]] = {}
    choices: tuple[Choice, ...] = ()
    for token in engine.generate(PROMPT, params):
        if token.finished:
            choices = token.finished.choices
        else:
            tokens.setdefault(token.index, []).extend(token.token_ids)
    assert all(choice.score is not None for choice in choices)
    return [(tokens.get(choice.index, []), choice.score or 0.0) for choice in choices]


def theirs(model: Any, **options: object) -> list[tuple[list[int], float]]:  # noqa: ANN401
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=[2, *STOPS],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    with torch.no_grad():
        result = model.generate(torch.tensor([PROMPT]), generation_config=config)
    found = []
    for row, score in zip(result.sequences, result.sequences_scores, strict=True):
        tokens: list[int] = []
        for token in row[len(PROMPT) :].tolist():
            if token in {2, *STOPS}:
                break
            tokens.append(token)
        found.append((tokens, float(score)))
    return found


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_are_those_of_transformers(
    model_and_engine: Models, num_beams: int, length_penalty: float, early_stopping: bool | str
) -> None:
    model, engine = model_and_engine
    shared = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    expected = theirs(model, num_return_sequences=num_beams, **shared)
    found = ours(engine, n=num_beams, **shared)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=2e-3)


def test_the_stop_tokens_of_these_tests_end_beams_early(
    model_and_engine: Models,
) -> None:
    lengths = {len(tokens) for tokens, _ in ours(model_and_engine[1], num_beams=5, n=5)}
    assert len(lengths) > 1
    assert min(lengths) < LENGTH


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}])
def test_rules_act_on_beams_as_in_transformers(model_and_engine: Models, options: dict[str, Any]) -> None:
    model, engine = model_and_engine
    expected = theirs(model, num_beams=4, num_return_sequences=2, **options)
    found = ours(engine, num_beams=4, n=2, **options)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=2e-3)


def test_beams_beside_other_requests_are_the_same_and_leave_nothing_behind(
    model_and_engine: Models,
) -> None:
    engine = model_and_engine[1]
    alone = ours(engine, num_beams=3, n=3)
    other = engine.generate([5, 6, 7], GenerationParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    next(other)
    assert ours(engine, num_beams=3, n=3) == alone
    assert sum(1 for _ in other) == 40
    assert (engine.scheduler.running, engine.scheduler.used_tokens) == (0, 0)


def test_a_stop_text_completes_a_beam_and_is_cut(model_and_engine: Models) -> None:
    engine = model_and_engine[1]
    params = GenerationParams(max_tokens=LENGTH, num_beams=2)
    whole = "".join(token.text for token in engine.generate(PROMPT, params))
    stop = whole[4:6]
    items = list(engine.generate(PROMPT, GenerationParams(max_tokens=LENGTH, num_beams=2, stop=(stop,))))
    assert all(stop not in item.text for item in items)
    assert items[-1].finished is not None


def test_more_beams_than_slots_are_refused(model_and_engine: Models) -> None:
    with pytest.raises(RequestError, match="num_beams is 6, but this machine's memory plan has 5 slots") as caught:
        model_and_engine[1].generate(PROMPT, GenerationParams(max_tokens=4, num_beams=6))
    assert caught.value.param == "num_beams"


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.permutations(range(6)))
def test_every_beam_finds_its_parents_row(parents: list[int], rows: list[int]) -> None:
    contents = {row: beam for beam, row in enumerate(rows)}
    placed, copies = place_beams(list(rows), parents)
    for source, target in copies:
        contents[target] = contents[source]
    assert sorted(placed) == list(range(6))
    assert [contents[row] for row in placed] == parents
    assert len(copies) == 6 - len(set(parents))


def test_the_most_likely_path_may_begin_with_the_less_likely_token() -> None:
    """Greedy takes token 1 (0.6) and then at best 0.5; beams find token 2 (0.4) followed by 1.0."""
    after = {1: [0.5, 0.5, 0.0], 2: [0.0, 1.0, 0.0]}
    search = BeamSearch(BeamRules(2, limit=2, stop_ids=frozenset(), length_penalty=0.0), History([0]))
    start = np.log(np.array([1e-9, 0.6, 0.4], dtype=np.float32))
    _, tokens = search.step([start, start], 3)
    rows = [np.log(np.array(after[token], dtype=np.float32) + np.float32(1e-9)) for token in tokens]
    search.step(rows, 3)
    best = search.best(1)[0]
    assert best.tokens == (2, 1)
    assert best.score == pytest.approx(np.log(0.4), abs=1e-4)
    assert search.done
