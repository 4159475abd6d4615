from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.truncation import (
    cut_min_p,
    cut_top_p,
    draw,
    keep_top_p,
    log_probability,
    top_candidates,
)
from lamplighter_agent.errors import EngineError

FLOATS = st.floats(-30, 30, width=32)
VECTORS = hnp.arrays(np.float32, st.integers(1, 400), elements=FLOATS)
LARGE = 5000


def logits_of(*probabilities: float) -> NDArray[np.float32]:
    return np.log(np.array(probabilities, dtype=np.float32))


def sampler(
    vocab_size: int, params: GenerationParams, *, prompt: tuple[int, ...] = (), stop: tuple[int, ...] = ()
) -> Sampler:
    seed = 1 if params.seed is None else params.seed
    return Sampler(params, History(prompt), stop_ids=frozenset(stop), seed=seed, vocab_size=vocab_size)


def tokens_of(one: Sampler, logits: NDArray[np.float32], count: int) -> list[int]:
    return [one.sample(logits)[0] for _ in range(count)]


@given(VECTORS, st.integers(1, 450))
def test_top_candidates_are_the_head_of_a_stable_sort(logits: NDArray[np.float32], count: int) -> None:
    found = top_candidates(logits, count)
    expected = np.argsort(-logits, kind="stable")[:count]
    assert found.ids.tolist() == expected.tolist()
    assert found.logits.tolist() == logits[expected].tolist()


@pytest.mark.parametrize("count", [1, 3, 19, 20, 900, LARGE])
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "many equal"])
def test_top_candidates_of_a_large_vocabulary(count: int, step: float) -> None:
    logits = np.random.default_rng(0).standard_normal(LARGE + 17).astype(np.float32)
    if step:
        logits = np.round(logits / step).astype(np.float32)
    assert top_candidates(logits, count).ids.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert keep_top_p(logits, 0.5).ids.tolist() == [1]
    assert keep_top_p(logits, 0.7).ids.tolist() == [1, 3]
    assert keep_top_p(logits, 0.85).ids.tolist() == [1, 3, 2]
    assert keep_top_p(logits, 1.0).ids.tolist() == [1, 3, 2, 0]


def test_top_p_of_a_flat_distribution_looks_beyond_its_first_guess() -> None:
    kept = keep_top_p(np.zeros(LARGE, dtype=np.float32), 0.9)
    assert kept.ids.tolist() == list(range(math.ceil(0.9 * LARGE)))


def test_top_p_within_candidates_counts_their_own_probability() -> None:
    candidates = top_candidates(logits_of(0.4, 0.3, 0.2, 0.1), 2)
    assert cut_top_p(candidates, 0.5).ids.tolist() == [0]
    assert cut_top_p(candidates, 0.6).ids.tolist() == [0, 1]


def test_min_p_is_relative_to_the_most_likely_token() -> None:
    candidates = top_candidates(logits_of(0.5, 0.26, 0.24), 3)
    assert cut_min_p(candidates, 0.5).ids.tolist() == [0, 1]


@given(VECTORS, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(logits: NDArray[np.float32], uniform: float) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    reached = np.cumsum(weights) / weights.sum()
    index = draw(logits, uniform)
    # Sums of float32 groups differ from one long double sum by less than this.
    slack = 1e-4
    assert (reached[index - 1] if index else 0.0) <= uniform + slack
    assert reached[index] >= uniform - slack


def test_draw_never_falls_on_a_banned_token() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 1.0, -np.inf], dtype=np.float32)
    edges = [0.0, math.nextafter(1.0, 0.0), 1 / (1 + math.e)]
    assert {draw(logits, uniform) for uniform in [*np.linspace(0, 0.999, 200), *edges]} == {1, 3}


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.2])
    one = sampler(3, GenerationParams(temperature=1.0))
    drawn = np.bincount(tokens_of(one, logits_of(*probabilities), 4000), minlength=3) / 4000
    # Five standard deviations of 4,000 draws.
    assert np.abs(drawn - probabilities).max() < 5 * math.sqrt(0.25 / 4000)


def test_temperature_sharpens() -> None:
    one = sampler(2, GenerationParams(temperature=0.5))
    share = np.mean(tokens_of(one, logits_of(0.25, 0.75), 4000))
    assert share == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}]
)
def test_greedy_takes_the_first_of_the_most_likely(options: dict[str, Any]) -> None:
    logits = np.array([0.0, 7.0, 1.0, 7.0], dtype=np.float32)
    assert set(tokens_of(sampler(4, GenerationParams(**options)), logits, 20)) == {1}


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.4}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),
        ({"top_k": 3, "min_p": 0.7}, {0, 1}),
        ({"top_p": 0.85, "min_p": 0.7}, {0, 1}),
    ],
)
def test_truncation_limits_what_is_drawn(options: dict[str, Any], allowed: set[int]) -> None:
    one = sampler(4, GenerationParams(temperature=1.0, **options))
    assert set(tokens_of(one, logits_of(0.4, 0.3, 0.2, 0.1), 300)) == allowed


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    first, again, other = (
        tokens_of(sampler(1000, GenerationParams(temperature=1.0, seed=seed)), logits, 20) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_repetition_penalty_weakens_tokens_of_prompt_and_text() -> None:
    one = sampler(3, GenerationParams(temperature=0.0, repetition_penalty=2.0), prompt=(0,))
    # 4 / 2 = 2 against 3, then 3 / 2 = 1.5 against 2, then both stay penalized once.
    assert tokens_of(one, np.array([4.0, 3.0, -1.0], dtype=np.float32), 3) == [1, 0, 0]


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    one = sampler(2, GenerationParams(temperature=0.0, repetition_penalty=2.0), prompt=(0,))
    assert tokens_of(one, np.array([-1.0, -1.5], dtype=np.float32), 1) == [1]


def test_presence_penalty_counts_once_and_only_generated_tokens() -> None:
    one = sampler(2, GenerationParams(temperature=0.0, presence_penalty=1.0), prompt=(0,))
    assert tokens_of(one, np.array([1.5, 0.0], dtype=np.float32), 4) == [0, 0, 0, 0]
    one = sampler(2, GenerationParams(temperature=0.0, presence_penalty=2.0))
    assert tokens_of(one, np.array([1.5, 0.0], dtype=np.float32), 3) == [0, 1, 0]


def test_frequency_penalty_grows_with_the_count() -> None:
    one = sampler(2, GenerationParams(temperature=0.0, frequency_penalty=1.0))
    assert tokens_of(one, np.array([2.5, 0.0], dtype=np.float32), 5) == [0, 0, 0, 1, 0]


def test_logit_bias_is_added() -> None:
    one = sampler(3, GenerationParams(temperature=0.0, logit_bias={2: 5.0, 0: -5.0}))
    assert tokens_of(one, np.array([3.0, 2.0, 0.0], dtype=np.float32), 1) == [2]


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    one = sampler(2, GenerationParams(temperature=0.0, min_tokens=2), stop=(0,))
    assert tokens_of(one, np.array([1.0, 0.0], dtype=np.float32), 4) == [1, 1, 0, 0]


def test_padding_beyond_the_vocabulary_is_never_drawn() -> None:
    assert tokens_of(sampler(2, GenerationParams(temperature=0.0)), np.array([0.0, 1.0, 9.0], dtype=np.float32), 1) == [
        1
    ]


def test_the_model_row_is_left_as_it_was() -> None:
    logits = logits_of(0.4, 0.6)
    before = logits.copy()
    one = sampler(
        2, GenerationParams(temperature=0.7, repetition_penalty=2.0, logit_bias={0: 1.0}, top_p=0.9), prompt=(1,)
    )
    tokens_of(one, logits, 3)
    assert logits.tolist() == before.tolist()


def test_log_probabilities_are_those_of_the_model() -> None:
    report = log_probability(logits_of(0.1, 0.6, 0.3) + np.float32(5), 0, 2)
    assert report.token_id == 0
    assert report.logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token for token, _ in report.top] == [1, 2]
    assert [value for _, value in report.top] == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(EngineError, match="not finite, at generated token 1"):
        sampler(2, GenerationParams(temperature=0.0)).sample(np.array([0.0, bad], dtype=np.float32))
