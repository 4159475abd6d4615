"""Rotary position embeddings: configurations read from a checkpoint, and the cos and sin tables they make.

Frequencies and angles are computed in float32, step by step as transformers does: at position 5000 the rounding of an
angle is 0.0002 radians, which models were trained with and which exact tables would show as a difference of logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_agent.package.manifest import RopeScaling
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import NO_VALUE, Graph, TensorSpec, Value, Weight

Frequencies = npt.NDArray[np.float32]
Table = npt.NDArray[np.float32]

ROTARY_STEP: Final = 16
"""``GroupQueryAttention`` rotates with tables whose width, half of what is rotated, is a multiple of 8. Other
numbers of features are rotated in nodes of their own, which take positions."""

_SUPPORTED: Final = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation whose angle is ``position * frequency / factor``.

    Attributes:
        theta: Base of the frequencies.
        rotary_dim: Leading features of a head that are rotated.
        factor: Divides every frequency; 1 for unscaled and above for ``linear``.
    """

    theta: float
    rotary_dim: int
    factor: float = 1.0

    @property
    def rope_type(self) -> str:
        """Name of the scaling in Hugging Face's words."""
        return "default" if self.factor == 1.0 else "linear"

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin."""
        return 1.0

    def frequencies(self) -> Frequencies:
        """Return float32 [rotary_dim / 2], radians a position."""
        return unscaled_frequencies(self.theta, self.rotary_dim) / self.factor

    def rows(self, positions: int) -> int:
        """Return the rows of the tables for ``positions`` positions."""
        return positions

    def tables(self, positions: int) -> tuple[Table, Table]:
        """Return cos and sin, float32 [rows, rotary_dim / 2]."""
        return make_tables(self.frequencies(), positions, self.amplitude)

    def facts(self) -> RopeScaling:
        """Return the manifest's description."""
        return RopeScaling(
            rope_type=self.rope_type,
            rope_theta=self.theta,
            rotary_dim=self.rotary_dim,
            inv_freq=tuple(self.frequencies().tolist()),
        )


@dataclass(frozen=True, slots=True)
class Llama3Rope(Rope):
    """Low frequencies divided by ``factor``, high ones kept, and a smooth passage between.

    Attributes:
        low_freq_factor: Wavelengths above ``original_context / low_freq_factor`` are scaled fully.
        high_freq_factor: Wavelengths below ``original_context / high_freq_factor`` are not scaled.
        original_context: Tokens that the unscaled model was trained on.
    """

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    @property
    def rope_type(self) -> str:
        """Name of the scaling in Hugging Face's words."""
        return "llama3"

    def frequencies(self) -> Frequencies:
        """Return float32 [rotary_dim / 2], radians a position."""
        base = unscaled_frequencies(self.theta, self.rotary_dim)
        # torch divides a number by an array as the array's inverse times the number.
        lengths = _inverse(base) * (2 * math.pi)
        turns = _inverse(lengths) * self.original_context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - kept) * base / self.factor + kept * base
        return np.where(kept < 0, base / self.factor, np.where(kept > 1, base, between))


@dataclass(frozen=True, slots=True)
class YarnRope(Rope):
    """YaRN (arXiv 2309.00071): features that turn slowly are divided by ``factor``, fast ones kept, a ramp between.

    Attributes:
        attention_factor: Factor of cos and sin.
        beta_fast: Features with more turns than this over the original context are kept.
        beta_slow: Features with fewer turns are scaled fully.
        original_context: Tokens that the unscaled model was trained on.
        truncate: True if the ramp's ends are rounded outwards to whole features.
    """

    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 4096
    truncate: bool = True

    @property
    def rope_type(self) -> str:
        """Name of the scaling in Hugging Face's words."""
        return "yarn"

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin."""
        return self.attention_factor

    def frequencies(self) -> Frequencies:
        """Return float32 [rotary_dim / 2], radians a position."""
        base = wavelengths(self.theta, self.rotary_dim)
        low, high = self._feature_of(self.beta_fast), self._feature_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        high += 0.001 if low == high else 0.0
        features = np.arange(self.rotary_dim // 2, dtype=np.float32)
        kept = 1 - np.clip((features - low) / (high - low), 0, 1)
        frequencies: Frequencies = _inverse(self.factor * base) * (1 - kept) + _inverse(base) * kept
        return frequencies

    def _feature_of(self, turns: float) -> float:
        """Return which feature makes ``turns`` turns over the original context."""
        ratio = self.original_context / (turns * 2 * math.pi)
        return self.rotary_dim * math.log(ratio) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class LongRope(Rope):
    """LongRoPE (arXiv 2402.13753): one divisor a frequency, and another set of them for long texts.

    The tables hold the rows of the short set for ``original_context`` positions, then those of the long set for all.
    :func:`~lamplighter_builder.components.positions.long_rope_positions` chooses rows for each text.

    Attributes:
        short_factors: Divisors for texts of at most ``original_context`` tokens, [rotary_dim / 2].
        long_factors: Divisors for longer ones.
        original_context: Tokens that the unscaled model was trained on.
        short_amplitude: Factor of cos and sin with the short set.
        long_amplitude: The same with the long set.
    """

    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_context: int = 4096
    short_amplitude: float = 1.0
    long_amplitude: float = 1.0

    @property
    def rope_type(self) -> str:
        """Name of the scaling in Hugging Face's words."""
        return "longrope"

    def rows(self, positions: int) -> int:
        """Return the rows of the tables for ``positions`` positions."""
        return self.short_rows(positions) + (positions if self.switches(positions) else 0)

    def short_rows(self, positions: int) -> int:
        """Return the rows of the short set."""
        return min(self.original_context, positions)

    def switches(self, positions: int) -> bool:
        """Tell whether texts of up to ``positions`` tokens may need the long set."""
        return positions > self.original_context

    def tables(self, positions: int) -> tuple[Table, Table]:
        """Return cos and sin, float32 [rows, rotary_dim / 2]."""
        base = wavelengths(self.theta, self.rotary_dim)
        short_set, long_set = (
            _inverse(np.array(factors, dtype=np.float32) * base) for factors in (self.short_factors, self.long_factors)
        )
        short = make_tables(short_set, self.short_rows(positions), self.short_amplitude)
        if not self.switches(positions):
            return short
        long = make_tables(long_set, positions, self.long_amplitude)
        return np.concatenate([short[0], long[0]]), np.concatenate([short[1], long[1]])

    def facts(self) -> RopeScaling:
        """Return the manifest's description."""
        return RopeScaling(
            rope_type=self.rope_type,
            rope_theta=self.theta,
            rotary_dim=self.rotary_dim,
            shiftable=False,
            original_max_position_embeddings=self.original_context,
        )


class RopeTables(NamedTuple):
    """cos and sin, float32 [rows, rotary_dim / 2] each, shared by layers.

    ``position_ids`` int64 [B, S] says which row each token takes; left out, it is the token's position.
    """

    cos: Value
    sin: Value
    position_ids: Value = NO_VALUE


def unscaled_frequencies(theta: float, rotary_dim: int) -> Frequencies:
    """Return float32 [rotary_dim / 2], radians a position (arXiv 2104.09864)."""
    return _inverse(wavelengths(theta, rotary_dim))


def wavelengths(theta: float, rotary_dim: int) -> Frequencies:
    """Return float32 [rotary_dim / 2], positions a radian: the inverse of the frequencies before it is taken."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim
    powers: Frequencies = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    return powers


def _inverse(values: Frequencies) -> Frequencies:
    inverse: Frequencies = np.float32(1.0) / values
    return inverse


def make_tables(frequencies: Frequencies, positions: int, amplitude: float) -> tuple[Table, Table]:
    """Return ``amplitude`` times cos and sin of ``position * frequency``, float32 [positions, rotary_dim / 2]."""
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    return np.cos(angles) * np.float32(amplitude), np.sin(angles) * np.float32(amplitude)


def declare_tables(graph: Graph, rope: Rope, positions: int, name: str = "rope") -> RopeTables:
    """Declare the tables for ``positions`` positions."""
    shape = (rope.rows(positions), rope.rotary_dim // 2)
    outputs = (TensorSpec(f"{name}.cos", np.float32, shape), TensorSpec(f"{name}.sin", np.float32, shape))

    def convert(_sources: object) -> list[Table]:
        return list(rope.tables(positions))

    return RopeTables(*graph.weight(Weight("rope", (), outputs, convert)))


def read_rope(config: Fields, rotary_dim: int, *, default_theta: float = 10000.0) -> Rope:
    """Read the rotary embedding from a ``config.json``, in its old and its new spelling.

    Old: ``rope_theta`` and ``rope_scaling``; new: both inside ``rope_parameters``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If the scaling is of another kind.
    """
    nested = config.section("rope_parameters") or config.section("rope_scaling")
    owner = nested if nested is not None and nested.has("rope_theta") else config
    return make_rope(config, nested, theta=owner.positive("rope_theta", default=default_theta), rotary_dim=rotary_dim)


def read_partial_rotary_dim(config: Fields, head_dim: int, *, default: float) -> int:
    """Return the leading features of a head that are rotated, from ``partial_rotary_factor`` in either spelling.

    Raises:
        CheckpointError: If it is no number, or gives no even number of features.
    """
    nested = config.section("rope_parameters") or config.section("rope_scaling")
    owner = nested if nested is not None and nested.has("partial_rotary_factor") else config
    share = owner.number("partial_rotary_factor", default=default)
    rotary_dim = int(head_dim * share)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"{owner.origin}: partial_rotary_factor {share} of head_dim {head_dim} gives {rotary_dim} rotated features"
        )
    return rotary_dim


def make_rope(config: Fields, nested: Fields | None, *, theta: float, rotary_dim: int) -> Rope:
    """Return the rope that a scaling section describes; None is the unscaled one.

    Args:
        config: All of ``config.json``, for the context lengths.
        nested: ``rope_scaling``, ``rope_parameters`` or one of its layer types.
        theta: Base of the frequencies.
        rotary_dim: Leading features of a head that are rotated.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If the scaling is of another kind, or the number of features is odd.
    """
    if rotary_dim % 2:
        raise UnsupportedModelError(f"{config.origin}: {rotary_dim} rotated features of a head are not supported")
    rope_type = (
        "default" if nested is None else nested.text("rope_type", default=nested.text("type", default="default"))
    )
    if nested is None or rope_type == "default":
        return Rope(theta, rotary_dim)
    if rope_type == "linear":
        return Rope(theta, rotary_dim, nested.positive("factor"))
    if rope_type == "llama3":
        return Llama3Rope(
            theta,
            rotary_dim,
            nested.positive("factor"),
            nested.number("low_freq_factor"),
            nested.number("high_freq_factor"),
            _original_context(config, nested),
        )
    if rope_type == "yarn":
        return _yarn(config, nested, theta, rotary_dim)
    if rope_type == "longrope":
        return _longrope(config, nested, theta, rotary_dim)
    raise UnsupportedModelError(
        f"{config.origin}: rope type {rope_type!r} is not supported", hint=f"supported are: {', '.join(_SUPPORTED)}"
    )


def _yarn(config: Fields, nested: Fields, theta: float, rotary_dim: int) -> YarnRope:
    original = _original_context(config, nested)
    factor = nested.positive("factor", default=config.integer("max_position_embeddings") / original)
    mscale, mscale_all = nested.number("mscale", default=0.0), nested.number("mscale_all_dim", default=0.0)
    if mscale and mscale_all:
        attention = _yarn_amplitude(factor, mscale) / _yarn_amplitude(factor, mscale_all)
    else:
        attention = _yarn_amplitude(factor, 1.0)
    return YarnRope(
        theta,
        rotary_dim,
        factor,
        attention_factor=nested.number("attention_factor", default=attention),
        beta_fast=nested.number("beta_fast", default=32.0),
        beta_slow=nested.number("beta_slow", default=1.0),
        original_context=original,
        truncate=nested.flag("truncate", default=True),
    )


def _yarn_amplitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(config: Fields, nested: Fields, theta: float, rotary_dim: int) -> LongRope:
    original = _original_context(config, nested)
    factor = nested.positive("factor", default=config.integer("max_position_embeddings") / original)
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    amplitude = nested.number("attention_factor", default=amplitude)
    return LongRope(
        theta,
        rotary_dim,
        short_factors=_factors(nested, "short_factor", rotary_dim),
        long_factors=_factors(nested, "long_factor", rotary_dim),
        original_context=original,
        short_amplitude=amplitude,
        long_amplitude=amplitude,
    )


def _factors(nested: Fields, key: str, rotary_dim: int) -> tuple[float, ...]:
    factors = nested.numbers(key)
    if len(factors) != rotary_dim // 2 or min(factors) <= 0:
        raise CheckpointError(
            f"{nested.origin}: {key} has {len(factors)} values, but must have {rotary_dim // 2}, all positive"
        )
    return factors


def _original_context(config: Fields, nested: Fields) -> int:
    """Return the context before scaling; the field of the whole config goes before that of the section."""
    key = "original_max_position_embeddings"
    owner = next((owner for owner in (config, nested) if owner.has(key)), None)
    value = config.integer("max_position_embeddings") if owner is None else owner.integer(key)
    if value < 2:
        raise CheckpointError(f"{(owner or config).origin}: {key} is {value}, but must be 2 or more")
    return value
