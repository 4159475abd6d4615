"""Scales for an 8-bit cache, from runs of the finished model over a few pages of text.

Windows of calibration text are read too: those of the build's calibration, which may be a user's own text, or those
that come with the builder.

A channel's scale is its largest value by 127, with some room for texts that were not seen. The features of a key turn
in pairs with its position, so both get the length of the pair: it is the same at every position.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from tokenizers import Tokenizer

from lamplighter_agent.package.manifest import CacheScales, ModelFacts, RopeScaling
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.calibration import TokenArray
from lamplighter_builder.runner import Runner

_MAX_TOKENS: Final = 512
_MAX_WINDOWS: Final = 8
"""Windows that are read: beyond them the largest values hardly grow. Without any, the largest values on other text were
2.6 times those of the page (SmolLM2), and the cache cost half as much again."""

_LARGEST_CODE: Final = 127
_ROOM: Final = 1.1
"""More loses more of each step than it saves from clipping (SmolLM2, other text, KL of the cache: 0.0094 with 1.3, not
0.0086)."""

_SMALLEST: Final = 1e-6
_WINDOWED_HEAD_STEP: Final = 16

CALIBRATION_TEXT: Final = """\
The harbour was quiet when the keeper climbed the tower. He carried oil, a brush and a book in which he wrote down
every ship that passed: its name, if he could read it, the hour, the weather and the colour of its lights. On the 14th
of March 1887 he counted 23 of them, more than in any night before. "What are they all looking for?" he asked, but
nobody answered.

Pumps, valves and sensors report once a minute. If the pressure in line 4 rises above 6.5 bar, close valve V-12, wait
ten seconds and read the gauge again. Never open the cover while the motor is running.

1. Check the oil level.
2. Drain the filter and note the amount of water.
3. Start the compressor; it must reach 8 bar within 90 seconds.

def moving_average(values: list[float], width: int) -> list[float]:
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means

{"device": "box-17", "temperature_c": 41.25, "alarms": [], "door": {"open": false, "since": "2024-05-02T08:15:00Z"}}

Question: How far is it from the pier to the lighthouse, and how long does the boat take?
Answer: About three kilometres. The boat needs twenty minutes when the sea is calm, and does not sail in a storm.

Die Lampe brennt seit heute Morgen. Le phare est visible à douze milles. El barco llega mañana.
灯台は海のそばに立っている。 Маяк стоит на скале.
SELECT name, count(*) FROM ships WHERE seen > '1887-03-01' GROUP BY name ORDER BY 2 DESC;
"""


def takes_8_bit_cache(facts: ModelFacts) -> bool:
    """Tell whether the attention can keep 8-bit values: heads of windowed layers must be multiples of 16 features."""
    return facts.sliding_window is None or facts.head_dim % _WINDOWED_HEAD_STEP == 0


def calibrate_cache(runner: Runner, tokenizer: Tokenizer, facts: ModelFacts, windows: TokenArray) -> CacheScales:
    """Run the model over ``CALIBRATION_TEXT`` and the first few windows; return the scales of every layer.

    Args:
        runner: The model.
        tokenizer: Its tokenizer.
        facts: Its sizes.
        windows: Tokens of calibration text, int64 [windows, tokens], perhaps none.
    """
    longest = min(_MAX_TOKENS, facts.max_position_embeddings - 1)
    texts = [tokenizer.encode(CALIBRATION_TEXT).ids[:longest], *windows[:_MAX_WINDOWS, :longest].tolist()]
    found = [_largest(runner, tokens, facts) for tokens in texts]
    step = _ROOM / _LARGEST_CODE
    key, value = (np.maximum.reduce([largest[kind] for largest in found]) * step for kind in range(2))
    return CacheScales(key=tuple(map(_bytes, key)), value=tuple(map(_bytes, value)))


def _largest(runner: Runner, tokens: list[int], facts: ModelFacts) -> tuple[FloatArray, FloatArray]:
    """Return the largest keys and values of one text, float32 [layers, heads, head_dim] each."""
    row = np.array([tokens], dtype=np.int64)
    _, cache = runner.run(row, runner.empty_cache(), logits_start=len(tokens) - 1, rope_tokens=len(tokens))
    keys, values = [], []
    for layer in range(facts.num_hidden_layers):
        rope = facts.rope
        if facts.local_rope is not None and layer in (facts.sliding_layers or ()):
            rope = facts.local_rope
        if layer in facts.unrotated_layers:
            rope = None
        keys.append(_pair_lengths(cache.arrays[f"past_key_values.{layer}.key"][0], rope).max(axis=1))
        values.append(np.abs(cache.arrays[f"past_key_values.{layer}.value"][0]).max(axis=1))
    return np.stack(keys), np.stack(values)


def _pair_lengths(keys: FloatArray, rope: RopeScaling | None) -> FloatArray:
    """Return [heads, n, head_dim]: for every feature the length of the pair that it turns in, or its own."""
    lengths = np.abs(keys)
    if rope is None:
        return lengths
    half = rope.rotary_dim // 2
    if rope.interleaved:
        first, second = lengths[..., 0 : 2 * half : 2], lengths[..., 1 : 2 * half : 2]
    else:
        first, second = lengths[..., :half], lengths[..., half : 2 * half]
    first[:] = second[:] = np.hypot(first, second)
    return lengths


def _bytes(scales: FloatArray) -> bytes:
    return np.maximum(scales, _SMALLEST).astype("<f4").tobytes()
