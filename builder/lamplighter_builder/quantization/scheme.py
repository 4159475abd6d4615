"""Which matrix is quantized how: the one place where a choice by name is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray, QuantizedMatrix

Quantizer = Callable[[FloatArray, BlockFormat], QuantizedMatrix]
"""From float32 [N, K] and a format to a matrix of that format."""


@dataclass(frozen=True, slots=True)
class MatrixRecipe:
    """How one matrix is quantized.

    Attributes:
        format: Bits, block size and symmetry, known before the weight is read.
        quantize: From float32 [N, K] to a matrix of that format.
    """

    format: BlockFormat
    quantize: Callable[[FloatArray], QuantizedMatrix]


Scheme = Callable[[str], MatrixRecipe]
"""From a matrix's module path (``model.layers.0.mlp.down_proj``) to its recipe; always the same for the same path."""


def uniform(block_format: BlockFormat, quantize: Quantizer) -> Scheme:
    """Return the scheme that quantizes every matrix alike."""
    recipe = MatrixRecipe(block_format, lambda weight: quantize(weight, block_format))
    return lambda _path: recipe
