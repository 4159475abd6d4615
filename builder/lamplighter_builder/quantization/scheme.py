"""Which matrix is quantized how: the one place where a choice by name is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray, QuantizedMatrix
from lamplighter_builder.quantization.rtn import quantize_rtn


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


def uniform_rtn(block_format: BlockFormat) -> Scheme:
    """Return the scheme that rounds every matrix to nearest in one format."""
    recipe = MatrixRecipe(block_format, lambda weight: quantize_rtn(weight, block_format))
    return lambda _module: recipe
