"""Mixed precision under a budget: which format each matrix gets, so that the model diverges least for its bytes.

What a matrix costs in a format is estimated before anything is quantized. A rounding error is spread evenly over a step
of the scale, so its mean square is ``scale ** 2 / 12``; to second order, the divergence that it brings is half of that
times the Fisher information. Costs of different matrices add up, so the choice is a knapsack: steps of best gain a
byte, taken greedily. A bound on the work of a decode step makes it a knapsack with two limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lamplighter_agent.errors import ConfigError
from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray

CANDIDATES: Final = (
    BlockFormat(bits=4, block_size=128, symmetric=False),
    BlockFormat(bits=4, block_size=64, symmetric=False),
    BlockFormat(bits=4, block_size=32, symmetric=False),
    BlockFormat(bits=5, block_size=128, symmetric=True),
    BlockFormat(bits=5, block_size=64, symmetric=True),
    BlockFormat(bits=5, block_size=32, symmetric=True),
    BlockFormat(bits=6, block_size=128, symmetric=True),
    BlockFormat(bits=6, block_size=64, symmetric=True),
    BlockFormat(bits=6, block_size=32, symmetric=True),
    BlockFormat(bits=8, block_size=128, symmetric=True),
    BlockFormat(bits=8, block_size=64, symmetric=True),
    BlockFormat(bits=8, block_size=32, symmetric=True),
)
"""Formats from which a budget chooses."""

PLAIN: Final = CANDIDATES[2]
"""INT4 as a build without a size makes it, which sizes and speeds are compared with."""

_WORK_OF_8_BITS: Final = 1.75
"""Time of a product with 8 bits, with 4 bits 1: measured with AVX2. With VNNI it is less."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A matrix in a format.

    Attributes:
        format: The format.
        nbytes: Bytes of codes, scales and zero points.
        cost: Expected divergence of the model that comes of it, in nats a token.
        work: Time of its product in a decode step, 1 for each weight of plain INT4.
    """

    format: BlockFormat
    nbytes: int
    cost: float
    work: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """What all matrices together may have.

    Attributes:
        nbytes: Most bytes.
        work: Most work in a decode step, see ``Choice``.
    """

    nbytes: int
    work: float = math.inf


def expected_cost(
    weight: FloatArray, block_format: BlockFormat, variance: FloatArray, noise: FloatArray | None = None
) -> float:
    """Estimate the divergence that quantizing a weight brings, in nats a token.

    Args:
        weight: float32 [N, K].
        block_format: Bits, block size and symmetry.
        variance: float32 [K], the Fisher information of each in feature's weights, those of later features refitted
            (``gptq.conditional_variance``).
        noise: float32 [K], the mean square of what the kernel's rounding of activations changes each in feature by,
            tokens weighted alike (``activation_noise``); None: not counted.
    """
    blocks = weight.reshape(weight.shape[0], -1, block_format.block_size)
    lowest, highest = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    if block_format.symmetric:
        steps = np.maximum(-lowest, highest) / block_format.default_zero_point
    else:
        steps = (highest - lowest) / block_format.max_code
    shares = variance.reshape(-1, block_format.block_size).sum(axis=1)
    mean_squares = steps.astype(np.float64) ** 2 / 12
    cost = float((mean_squares @ shares).sum() / 2)
    if noise is not None:
        cost += float(np.einsum("nk,nk->k", weight, weight).astype(np.float64) @ noise / 2)
    return cost


def decode_work(weights: int, block_format: BlockFormat) -> float:
    """Return the time of a product with one row of activations, 1 for each weight of plain INT4."""
    return weights * (1.0 if block_format.kernel_bits == PLAIN.kernel_bits else _WORK_OF_8_BITS)


def allocate(choices: Mapping[str, Sequence[Choice]], bound: Bound) -> dict[str, Choice]:
    """Choose a format for every matrix.

    Args:
        choices: What each matrix can be.
        bound: For all of them.

    Raises:
        ConfigError: If the smallest choices exceed the bytes.
    """
    chosen = {name: min(options, key=lambda choice: choice.nbytes) for name, options in choices.items()}
    left_bytes = bound.nbytes - sum(choice.nbytes for choice in chosen.values())
    left_work = bound.work - sum(choice.work for choice in chosen.values())
    if left_bytes < 0:
        raise ConfigError(
            f"the matrices need at least {bound.nbytes - left_bytes} bytes with 4 bits a weight, but the budget leaves "
            f"{bound.nbytes}",
            hint="raise --target-mb or --bits-per-weight",
        )
    # What a step takes of each limit, by how scarce it is at the start.
    byte_price, work_price = 1 / max(left_bytes, 1), 1 / max(left_work, 1.0)
    while True:
        best = max(
            (
                (
                    (before.cost - choice.cost) / (more_bytes * byte_price + max(more_work, 0.0) * work_price),
                    name,
                    choice,
                )
                for name, before in chosen.items()
                for choice in choices[name]
                if choice.cost < before.cost
                and 0 < (more_bytes := choice.nbytes - before.nbytes) <= left_bytes
                and (more_work := choice.work - before.work) <= left_work
            ),
            key=lambda step: step[0],
            default=None,
        )
        if best is None:
            return chosen
        _, name, choice = best
        left_bytes -= choice.nbytes - chosen[name].nbytes
        left_work -= choice.work - chosen[name].work
        chosen[name] = choice
