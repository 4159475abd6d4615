"""From a size of the files, and a bound on the time of a decode step, to a format of every matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lamplighter_agent.errors import ConfigError
from lamplighter_builder.quantization.allocation import CANDIDATES, PLAIN, Bound, Choice, allocate
from lamplighter_builder.quantization.blockwise import BlockFormat
from lamplighter_builder.quantization.least_squares import quantize_least_squares
from lamplighter_builder.quantization.report import Alternative
from lamplighter_builder.quantization.scheme import MatrixRecipe, Quantizer, Scheme

_CURVE_POINTS: Final = 12
_SMALL: Final = 1.2
_SMALL_SLOWDOWN: Final = 0.1
"""Who asks for hardly more bytes than plain INT4 has wants its speed; who gives more wants better answers."""

_PRODUCTS_SHARE: Final = 0.7
"""Of the time of a decode step, what products with matrices take: as measured with SmolLM2-135M."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a user allows a package.

    Attributes:
        nbytes: Most bytes of the model file and the weights file.
        max_slowdown: Share by which a decode step may take longer than with plain INT4, estimated; None: up to
            ``_SMALL`` times the size of plain INT4 ``_SMALL_SLOWDOWN``, and any above.
    """

    nbytes: int
    max_slowdown: float | None = None

    def most_work(self, choices: Mapping[str, Sequence[Choice]]) -> float:
        """Return the most work of a decode step, in the unit of ``Choice``."""
        plain = [next((c for c in options if c.format == PLAIN), options[0]) for options in choices.values()]
        slowdown = self.max_slowdown
        if slowdown is None:
            if self.nbytes > _SMALL * sum(choice.nbytes for choice in plain):
                return math.inf
            slowdown = _SMALL_SLOWDOWN
        return (1 + slowdown / _PRODUCTS_SHARE) * sum(choice.work for choice in plain)


def check_reach(
    shapes: Mapping[str, Sequence[tuple[int, int]]],
    size_of: Callable[[Mapping[str, BlockFormat]], int],
    budget: Budget,
) -> None:
    """Check a budget before any work is done for it.

    Args:
        shapes: (N, K) of what each matrix is stacked from, by path.
        size_of: From the formats of all matrices to the bytes of both files.
        budget: For the whole package.

    Raises:
        ConfigError: If it is below what four bits a weight need.
    """
    smallest = {
        path: min(
            (candidate for candidate in CANDIDATES if not parts[0][1] % candidate.block_size),
            key=lambda candidate: sum(candidate.nbytes(*shape) for shape in parts),
        )
        for path, parts in shapes.items()
    }
    least = size_of(smallest)
    if least > budget.nbytes:
        raise ConfigError(
            f"the model needs at least {least / 1e6:.2f} MB with 4 bits a weight, but the budget is "
            f"{budget.nbytes / 1e6:.2f} MB",
            hint="raise --target-mb or --bits-per-weight",
        )


def size_curve(choices: Mapping[str, Sequence[Choice]], max_slowdown: float | None = None) -> list[Alternative]:
    """Return the expected divergence at sizes between the smallest and the largest that the choices make.

    Behind these come the formats that all matrices can have alike.
    """
    smallest = sum(min(choice.nbytes for choice in options) for options in choices.values())
    largest = sum(max(choice.nbytes for choice in options) for options in choices.values())
    points = []
    for share in np.linspace(0, 1, _CURVE_POINTS):
        nbytes = round(smallest + float(share) * (largest - smallest))
        work = Budget(nbytes, max_slowdown).most_work(choices)
        chosen = allocate(choices, Bound(nbytes, work)).values()
        points.append(_alternative(chosen))
    for candidate in CANDIDATES:
        alike = [choice for options in choices.values() for choice in options if choice.format == candidate]
        if len(alike) == len(choices):
            name = f"{candidate.bits} bits in blocks of {candidate.block_size}"
            points.append(_alternative(alike, name))
    return points


def _alternative(chosen: Collection[Choice], name: str = "") -> Alternative:
    return Alternative(sum(choice.nbytes for choice in chosen), sum(choice.cost for choice in chosen), name)


def fit_formats(
    choices: Mapping[str, Sequence[Choice]], size_of: Callable[[Mapping[str, BlockFormat]], int], budget: Budget
) -> dict[str, BlockFormat]:
    """Choose formats so that a package keeps to a budget.

    Args:
        choices: What each matrix can be, by path.
        size_of: From the formats of all matrices to the bytes of both files, padding and all.
        budget: For the whole package.

    Raises:
        ConfigError: If four bits a weight exceed it.
    """
    smallest = {path: min(options, key=lambda choice: choice.nbytes) for path, options in choices.items()}
    fixed = size_of(_formats(smallest)) - sum(choice.nbytes for choice in smallest.values())
    left, work = budget.nbytes - fixed, budget.most_work(choices)
    while True:
        formats = _formats(allocate(choices, Bound(left, work)))
        excess = size_of(formats) - budget.nbytes
        if excess <= 0:
            return formats
        left -= excess  # padding differs between formats


def _formats(chosen: Mapping[str, Choice]) -> dict[str, BlockFormat]:
    return {path: choice.format for path, choice in chosen.items()}


def scheme_of(formats: Mapping[str, BlockFormat], quantize: Quantizer = quantize_least_squares) -> Scheme:
    """Return the scheme of chosen formats by path.

    Args:
        formats: A path without one is a matrix that no format fits: the plain one does not either.
        quantize: What becomes of a matrix that has not been calibrated.
    """

    def recipe(path: str) -> MatrixRecipe:
        block_format = formats.get(path, PLAIN)
        return MatrixRecipe(block_format, lambda weight: quantize(weight, block_format))

    return recipe
