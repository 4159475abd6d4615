"""Round to nearest: each block's scale from its own extremes, no calibration."""

from __future__ import annotations

import numpy as np

from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray, QuantizedMatrix


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
    values = weight.reshape(rows, blocks, block_format.block_size)
    lowest, highest = values.min(axis=2), values.max(axis=2)
    zero_points = None
    if block_format.symmetric:
        extreme = np.where(-lowest > highest, lowest, highest)
        scales = extreme / np.float32(-block_format.default_zero_point)
        zero = np.float32(block_format.default_zero_point)
    else:
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scales = (highest - lowest) / np.float32(block_format.max_code)
        zero_points = np.rint(-lowest / _nonzero(scales)).clip(0, block_format.max_code).astype(np.uint8)
        zero = zero_points.astype(np.float32)[:, :, None]
    codes = values / _nonzero(scales)[:, :, None]
    np.rint(codes, out=codes)
    codes += zero
    np.clip(codes, 0, block_format.max_code, out=codes)
    return QuantizedMatrix(
        format=block_format,
        codes=codes.astype(np.uint8).reshape(weight.shape),
        scales=scales.astype(np.float32),
        zero_points=zero_points,
    )


def _nonzero(scales: FloatArray) -> FloatArray:
    """Return the scales with 1 in place of 0, so that a block of zeros divides cleanly."""
    return np.where(scales == 0, np.float32(1), scales)
