"""The rules against transformers' own on the same logits, and against closed forms where transformers has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from transformers.generation import logits_process as reference

from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.processors import (
    BannedSequences,
    CountPenalties,
    DryPenalty,
    NoEarlyStop,
    NoRepeatNgram,
    Processor,
    RepetitionPenalty,
    make_processors,
)
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.truncation import Candidates, exclude_top_choices, keep_typical, top_candidates

Logits = NDArray[np.float32]

VOCAB = 40
LOGITS = hnp.arrays(np.float32, VOCAB, elements=st.floats(-20, 20, width=32), unique=True)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
FEW_TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=40)


def changed(processor: Processor, tokens: list[int], logits: Logits, *, prompt: int | None = None) -> Logits:
    """Return the logits after a rule; the first ``prompt`` tokens count as prompt, all if None."""
    history = History(tokens[: len(tokens) if prompt is None else prompt])
    for token in tokens[history.prompt_tokens :]:
        history.append(token)
    copy = logits.copy()
    processor(copy, history)
    return copy


def theirs(processor: Callable[..., torch.Tensor], tokens: list[int], logits: Logits) -> Logits:
    """Return what a processor of transformers makes of the same logits."""
    result = processor(torch.tensor([tokens]), torch.from_numpy(logits[None].copy()))
    array: Logits = result[0].numpy()
    return array


@given(TOKENS, LOGITS, st.floats(0.5, 3.0))
def test_repetition_penalty_is_that_of_transformers(tokens: list[int], logits: Logits, penalty: float) -> None:
    expected = theirs(reference.RepetitionPenaltyLogitsProcessor(penalty), tokens, logits)
    assert changed(RepetitionPenalty(penalty), tokens, logits) == pytest.approx(expected, rel=1e-5)


@given(FEW_TOKENS, LOGITS, st.integers(1, 5))
def test_no_repeat_ngram_is_that_of_transformers(tokens: list[int], logits: Logits, size: int) -> None:
    expected = theirs(reference.NoRepeatNGramLogitsProcessor(size), tokens, logits)
    assert changed(NoRepeatNgram(size), tokens, logits).tolist() == expected.tolist()


@given(FEW_TOKENS, LOGITS, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5))
def test_banned_sequences_are_those_of_transformers(
    tokens: list[int], logits: Logits, sequences: list[list[int]]
) -> None:
    expected = theirs(reference.NoBadWordsLogitsProcessor(sequences), tokens, logits)
    found = changed(BannedSequences(tuple(map(tuple, sequences))), tokens, logits)
    assert found.tolist() == expected.tolist()


@given(TOKENS, LOGITS, st.integers(0, 10), st.integers(0, 40))
def test_no_early_stop_is_that_of_transformers(tokens: list[int], logits: Logits, min_tokens: int, prompt: int) -> None:
    prompt = min(prompt, len(tokens))
    stops = [3, 7]
    rule = reference.MinNewTokensLengthLogitsProcessor(prompt, min_tokens, stops)
    found = changed(NoEarlyStop(np.array(stops), min_tokens), tokens, logits, prompt=prompt)
    assert found.tolist() == theirs(rule, tokens, logits).tolist()


@given(TOKENS, LOGITS, st.integers(0, 40), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_generated_tokens(
    tokens: list[int], logits: Logits, prompt: int, presence: float, frequency: float
) -> None:
    prompt = min(prompt, len(tokens))
    expected = logits.astype(np.float64)
    for token in range(VOCAB):
        count = tokens[prompt:].count(token)
        expected[token] -= presence * (count > 0) + frequency * count
    found = changed(CountPenalties(presence, frequency), tokens, logits, prompt=prompt)
    assert found == pytest.approx(expected, abs=1e-4)


@given(FEW_TOKENS, LOGITS, st.integers(1, 4), st.sets(st.integers(0, 3), max_size=1))
def test_dry_penalizes_the_longest_repetition_that_a_token_would_lengthen(
    tokens: list[int], logits: Logits, allowed: int, breakers: set[int]
) -> None:
    """The definition, written out: for each token the longest match of an earlier end with the present one."""
    longest: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[-1 - length] and tokens[end - length] not in breakers:
            length += 1
        longest[tokens[end + 1]] = max(longest.get(tokens[end + 1], 0), length)
    expected = logits.astype(np.float64)
    for token, length in longest.items():
        if length >= allowed:
            expected[token] -= 0.8 * 1.75 ** (length - allowed)
    found = changed(DryPenalty(0.8, 1.75, allowed, breakers.__contains__), tokens, logits)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def surprise_gaps(logits: Logits) -> NDArray[np.float64]:
    """Return how far each token's information is from the distribution's entropy, in float64."""
    log_probs = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum()
    gaps: NDArray[np.float64] = (-log_probs - entropy).abs().numpy()
    return gaps


@given(st.one_of(LOGITS, hnp.arrays(np.float32, 3000, elements=st.floats(-20, 20, width=32))), st.floats(0.05, 0.99))
@example(np.concatenate([np.full(2, 1e-10, np.float32), np.zeros(2998, np.float32)]), 0.5)
def test_typical_p_is_that_of_transformers(logits: Logits, mass: float) -> None:
    kept = set(np.flatnonzero(np.isfinite(theirs(reference.TypicalLogitsWarper(mass), [0], logits))).tolist())
    found = keep_typical(logits, mass)
    # Where the cumulated mass is the bound itself within float32, the sets differ by the token there and its ties.
    at_bound = surprise_gaps(logits)[sorted(kept ^ set(found.ids.tolist()))]
    assert at_bound.size == 0 or np.ptp(at_bound) < 1e-5
    assert found.logits.tolist() == logits[found.ids].tolist()


@given(
    LOGITS,
    st.sampled_from([0, 3, 10]),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from([0.7, 1.0, 1.6]),
)
def test_truncation_in_its_order_is_that_of_transformers(
    logits: Logits, top_k: int, top_p: float, min_p: float, typical_p: float, temperature: float
) -> None:
    chain: list[Any] = [reference.TemperatureLogitsWarper(temperature)]
    chain += [reference.TopKLogitsWarper(top_k)] if top_k else []
    chain += [reference.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [reference.MinPLogitsWarper(min_p)] if min_p else []
    chain += [reference.TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    scores = logits
    for warper in chain:
        scores = theirs(warper, [0], scores)
    allowed = set(np.flatnonzero(np.isfinite(scores)).tolist())
    params = GenerationParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    sampler = Sampler(params, History([0]), stop_ids=frozenset(), seed=1, vocab_size=VOCAB)
    drawn = {sampler.sample(logits)[0] for _ in range(60)}
    # The last token of a top-p or typical set may fall on either side of the bound within float32: one may differ.
    assert len(drawn - allowed) <= 1


def test_xtc_drops_all_top_choices_but_the_least_likely() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], dtype=np.float32))
    candidates = top_candidates(logits, 5)
    assert exclude_top_choices(candidates, 0.1).ids.tolist() == [2, 3, 4]
    assert exclude_top_choices(candidates, 0.35).ids.tolist() == [0, 1, 2, 3, 4]


def test_xtc_counts_probability_among_the_candidates() -> None:
    logits = np.log(np.array([0.05, 0.05, 0.9], dtype=np.float32))
    two = Candidates(np.array([0, 1]), logits[:2])
    assert exclude_top_choices(two, 0.5).ids.tolist() == [1]


@pytest.mark.parametrize(("probability", "expected"), [(0.0, {0, 1, 2}), (1.0, {2})])
def test_xtc_acts_with_its_probability(probability: float, expected: set[int]) -> None:
    logits = np.log(np.array([0.4, 0.35, 0.25], dtype=np.float32))
    params = GenerationParams(temperature=1.0, xtc_probability=probability, xtc_threshold=0.1)
    sampler = Sampler(params, History([0]), stop_ids=frozenset(), seed=1, vocab_size=3)
    assert {sampler.sample(logits)[0] for _ in range(200)} == expected


def test_bans_come_after_bias_so_that_nothing_lifts_them() -> None:
    params = GenerationParams(logit_bias={1: 100.0}, no_repeat_ngram_size=1, min_tokens=2)
    logits = np.zeros(4, dtype=np.float32)
    history = History([1, 2])
    for processor in make_processors(params, stop_ids=frozenset({3}), banned=((0,),)):
        processor(logits, history)
    assert logits.tolist() == [-np.inf] * 4
