"""What the choice of a token costs with each kind of option: microseconds of Python and numpy a token.

Measured on the logits behind two real prompts in turns, in a text of some hundred tokens, without the model between two
draws: its weights push the logits out of the caches, which adds some 20 us to every kind alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.sampling import Sampler

PREFIX: Final = "sampler_us "
"""Names of these figures begin so."""

_TOKENS: Final = 60

_PLAIN: Final = {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "ignore_eos": True, "seed": 1}
_KINDS: Final[dict[str, dict[str, object]]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 40},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "typical_p": {"temperature": 0.8, "typical_p": 0.9},
    "xtc": {"temperature": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.1},
    "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "presence_frequency": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "no_repeat_ngram": {"temperature": 0.0, "no_repeat_ngram_size": 3},
    "dry": {"temperature": 0.0, "dry_multiplier": 0.8},
    "logit_bias": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(100, 200), -1.0)},
    "logprobs_5": {"temperature": 0.0, "logprobs": 5},
    "top_k_p_min_p_penalty": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    },
}

MakeSampler = Callable[[History, GenerationParams], Sampler]


def sampler_costs(make_sampler: MakeSampler, rows: list[NDArray[np.float32]], prompt: list[int]) -> dict[str, float]:
    """Return the median microseconds of a draw for each kind of option.

    Args:
        make_sampler: Makes a sampler of the engine that is measured.
        rows: Logits, float32 [vocab_size]; used in turns.
        prompt: The text so far.
    """
    figures = {}
    for name, options in _KINDS.items():
        sampler = make_sampler(History(prompt), GenerationParams(**(_PLAIN | options)))
        seconds = []
        for index in range(_TOKENS):
            begun = time.perf_counter()
            sampler.sample(rows[index % len(rows)])
            seconds.append(time.perf_counter() - begun)
        figures[PREFIX + name] = statistics.median(seconds) * 1e6
    return figures
