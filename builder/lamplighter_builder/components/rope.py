"""Rotary position embeddings: configurations read from a checkpoint, and the cos and sin tables they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_agent.package.manifest import RopeScaling
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, TensorSpec, Value, Weight

Frequencies = npt.NDArray[np.float64]


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

    def frequencies(self) -> Frequencies:
        """Return float64 [rotary_dim / 2], radians a position."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        return 1.0 / (self.theta**exponents * self.factor)

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
        """Return float64 [rotary_dim / 2], radians a position."""
        base = Rope(self.theta, self.rotary_dim).frequencies()
        turns = self.original_context * base / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(kept, 0.0, 1.0)
        return base * (share + (1.0 - share) / self.factor)


class RopeTables(NamedTuple):
    """cos and sin, float32 [positions, rotary_dim / 2] each, shared by all layers."""

    cos: Value
    sin: Value


def read_rope(config: Fields, head_dim: int) -> Rope:
    """Read the rotary embedding from a ``config.json``, in its old and its new spelling.

    Old: ``rope_theta`` and ``rope_scaling``; new: both inside ``rope_parameters``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If the scaling is of another kind.
    """
    nested = config.section("rope_parameters") or config.section("rope_scaling")
    owner = nested if nested is not None and nested.has("rope_theta") else config
    theta = owner.number("rope_theta", default=10000.0)
    if nested is None:
        return Rope(theta, head_dim)
    rope_type = nested.text("rope_type", default=nested.text("type", default="default"))
    if rope_type == "default":
        return Rope(theta, head_dim)
    if rope_type == "linear":
        return Rope(theta, head_dim, nested.number("factor"))
    if rope_type == "llama3":
        return Llama3Rope(
            theta,
            head_dim,
            nested.number("factor"),
            nested.number("low_freq_factor"),
            nested.number("high_freq_factor"),
            nested.integer("original_max_position_embeddings"),
        )
    raise UnsupportedModelError(
        f"{config.origin}: rope type {rope_type!r} is not supported",
        hint="supported are: default, linear, llama3",
    )


def declare_tables(graph: Graph, rope: Rope, positions: int) -> RopeTables:
    """Declare the tables for ``positions`` positions."""
    shape = (positions, rope.rotary_dim // 2)
    outputs = (TensorSpec("rope.cos", np.float32, shape), TensorSpec("rope.sin", np.float32, shape))

    def convert(_sources: object) -> list[npt.NDArray[np.float32]]:
        angles = np.outer(np.arange(positions, dtype=np.float64), rope.frequencies())
        return [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]

    return RopeTables(*graph.weight(Weight("rope", (), outputs, convert)))
