"""Round to nearest: each block's scale from its own extremes, no calibration."""

from __future__ import annotations

import numpy as np

from lamplighter_builder.quantization.blockwise import (
    BlockFormat,
    CodeArray,
    FloatArray,
    QuantizedMatrix,
    nonzero,
    storable_scales,
)
from lamplighter_builder.quantization.rows import in_row_ranges


def quantize_rtn(weight: FloatArray, block_format: BlockFormat) -> QuantizedMatrix:
    """Quantize a weight by rounding each value to the nearest code of its block.

    Symmetric: the value of largest magnitude, with its sign, falls exactly on the lowest code, which reaches one step
    further from zero than the highest does. Asymmetric: the range from the smaller of minimum and zero to the larger
    of maximum and zero is spread over all codes.

    Args:
        weight: float32 [N, K].
        block_format: Bits, block size and symmetry.

    Raises:
        UnsupportedModelError: If K is no multiple of the block size.
    """
    rows, blocks = weight.shape[0], block_format.blocks(weight.shape[1])
    codes = np.empty(weight.shape, dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    zero_points = None if block_format.symmetric else np.empty((rows, blocks), dtype=np.uint8)

    def quantize_range(part: slice) -> None:
        values = weight[part].reshape(-1, blocks, block_format.block_size)
        if zero_points is None:
            scales[part], found = _symmetric(values, block_format)
        else:
            scales[part], zero_points[part], found = _asymmetric(values, block_format)
        codes[part] = found.reshape(codes[part].shape)

    in_row_ranges(rows, weight.shape[1] * weight.itemsize, quantize_range)
    return QuantizedMatrix(format=block_format, codes=codes, scales=scales, zero_points=zero_points)


def _symmetric(values: FloatArray, block_format: BlockFormat) -> tuple[FloatArray, FloatArray]:
    """Return scales [N, blocks] and codes [N, blocks, block_size] of values of that shape."""
    lowest, highest = values.min(axis=2), values.max(axis=2)
    scales = storable_scales(
        np.where(-lowest > highest, lowest, highest) / np.float32(-block_format.default_zero_point)
    )
    return scales, _round(values, scales, np.float32(block_format.default_zero_point), block_format)


def _asymmetric(values: FloatArray, block_format: BlockFormat) -> tuple[FloatArray, CodeArray, FloatArray]:
    """Return scales and zero points [N, blocks] and codes [N, blocks, block_size] of values of that shape."""
    lowest, highest = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
    scales = storable_scales((highest - lowest) / np.float32(block_format.max_code))
    zero_points = np.rint(-lowest / nonzero(scales)).clip(0, block_format.max_code).astype(np.uint8)
    codes = _round(values, scales, zero_points.astype(np.float32)[:, :, None], block_format)
    return scales, zero_points, codes


def _round(
    values: FloatArray, scales: FloatArray, zero: FloatArray | np.float32, block_format: BlockFormat
) -> FloatArray:
    codes = values / nonzero(scales)[:, :, None]
    np.rint(codes, out=codes)
    codes += zero
    return np.clip(codes, 0, block_format.max_code, out=codes)
