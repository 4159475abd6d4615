"""Moves cached keys to other positions, so that a cache can forget tokens in its middle and close the gap.

Rotary embeddings (arXiv 2104.09864) turn each pair of a key's features by position * frequency, so a key turned by a
difference of positions is the key of the other position, whatever factor scales cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.package.manifest import ModelFacts, RopeScaling

Keys = NDArray[np.float32 | np.int8]

_LARGEST_CODE: Final = 127


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """The rotation of one layer's keys.

    Attributes:
        frequencies: float64 [rotary_dim / 2], radians a position; empty for a layer that does not rotate.
        interleaved: True where pairs are neighbours, False where they are ``rotary_dim / 2`` apart.
        scales: float32 [heads, 1, head_dim] of an int8 cache, else None.
    """

    frequencies: NDArray[np.float64]
    interleaved: bool = False
    scales: NDArray[np.float32] | None = None

    def shift(self, keys: Keys, positions: int) -> Keys:
        """Return keys [heads, n, head_dim] as they would be ``positions`` later, or earlier if negative."""
        values: NDArray[np.float32] = np.array(keys, dtype=np.float32)
        if self.scales is not None:
            values *= self.scales
        half = len(self.frequencies)
        cos, sin = (
            turn(positions * self.frequencies).astype(np.float32) for turn in (np.cos, np.sin)
        )  # float64 angles: a float32 loses the fraction of many turns
        if self.interleaved:
            first, second = values[..., 0 : 2 * half : 2], values[..., 1 : 2 * half : 2]
        else:
            first, second = values[..., :half], values[..., half : 2 * half]
        turned = first * cos - second * sin
        second[:] = second * cos + first * sin
        first[:] = turned
        if self.scales is None:
            return values
        codes: Keys = np.rint(values / self.scales).clip(-_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
        return codes


def key_rotations(
    model: ModelFacts, scales: tuple[NDArray[np.float32], ...] | None = None
) -> tuple[KeyRotation, ...] | None:
    """Return the rotation of each layer, or None if cached keys cannot be moved by it.

    Args:
        model: The manifest's facts.
        scales: Key scales of each layer for an int8 cache, float32 [heads, head_dim].
    """
    local = model.local_rope if model.local_rope is not None else model.rope
    windowed = range(model.num_hidden_layers) if model.sliding_layers is None else model.sliding_layers
    found = []
    for layer in range(model.num_hidden_layers):
        rope = local if model.sliding_window is not None and layer in windowed else model.rope
        frequencies = None if rope is None or not rope.shiftable else rope_frequencies(rope)
        if frequencies is not None and layer in model.unrotated_layers:
            frequencies = frequencies[:0]
        if rope is None or frequencies is None:
            return None
        scale = None if scales is None else scales[layer][:, None, :]
        found.append(KeyRotation(frequencies, rope.interleaved, scale))
    return tuple(found)


def rope_frequencies(rope: RopeScaling) -> NDArray[np.float64] | None:
    """Return float64 [rotary_dim / 2], radians a position; None if the manifest does not tell."""
    if rope.inv_freq is not None:
        return np.array(rope.inv_freq, dtype=np.float64)
    if rope.rope_type != "default":
        return None
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies: NDArray[np.float64] = rope.rope_theta**-exponents
    return frequencies
