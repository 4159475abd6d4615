"""Mixed precision under a budget: which format each matrix gets, so that the model diverges least for its bytes.

What a matrix costs in a format is estimated before anything is quantized. A rounding error is spread evenly over a step
of the scale, so its mean square is ``scale ** 2 / 12``; to second order, the divergence that it brings is half of that
times the Fisher information. Costs of different matrices add up, so the choice is a knapsack: steps of best gain a
byte, taken greedily.
"""

from __future__ import annotations

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
    BlockFormat(bits=8, block_size=128, symmetric=True),
    BlockFormat(bits=8, block_size=64, symmetric=True),
    BlockFormat(bits=8, block_size=32, symmetric=True),
)
"""Formats from which a budget chooses, smallest first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A matrix in a format.

    Attributes:
        format: The format.
        nbytes: Bytes of codes, scales and zero points.
        cost: Expected divergence of the model that comes of it, in nats a token.
    """

    format: BlockFormat
    nbytes: int
    cost: float


def expected_cost(weight: FloatArray, block_format: BlockFormat, variance: FloatArray) -> float:
    """Estimate the divergence that quantizing a weight brings, in nats a token.

    Args:
        weight: float32 [N, K].
        block_format: Bits, block size and symmetry.
        variance: float32 [K], the Fisher information of each in feature's weights, those of later features refitted
            (``gptq.conditional_variance``).
    """
    blocks = weight.reshape(weight.shape[0], -1, block_format.block_size)
    lowest, highest = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    if block_format.symmetric:
        steps = np.maximum(-lowest, highest) / block_format.default_zero_point
    else:
        steps = (highest - lowest) / block_format.max_code
    shares = variance.reshape(-1, block_format.block_size).sum(axis=1)
    mean_squares = steps.astype(np.float64) ** 2 / 12
    return float((mean_squares @ shares).sum() / 2)


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> dict[str, Choice]:
    """Choose a format for every matrix.

    Args:
        choices: What each matrix can be.
        budget_bytes: Most bytes for all of them.

    Raises:
        ConfigError: If the smallest choices exceed the budget.
    """
    chosen = {name: min(options, key=lambda choice: choice.nbytes) for name, options in choices.items()}
    total = sum(choice.nbytes for choice in chosen.values())
    if total > budget_bytes:
        raise ConfigError(
            f"the matrices need at least {total} bytes with 4 bits a weight, but the budget leaves {budget_bytes}",
            hint="raise --target-mb or --bits-per-weight",
        )
    while True:
        best = max(
            (
                ((chosen[name].cost - choice.cost) / (choice.nbytes - chosen[name].nbytes), name, choice)
                for name, options in choices.items()
                for choice in options
                if choice.cost < chosen[name].cost and 0 < choice.nbytes - chosen[name].nbytes <= budget_bytes - total
            ),
            key=lambda step: step[0],
            default=None,
        )
        if best is None:
            return chosen
        _, name, choice = best
        total += choice.nbytes - chosen[name].nbytes
        chosen[name] = choice
