"""Scales and zero points by least squares: for each block those that lose least, in the importance of its features.

The range of a block is tried at several widths; each time the scale is refitted to the codes that it gave, which has a
closed form. Clipping the extremes a little costs less than a wider step for all the others.
"""

from __future__ import annotations

from typing import Final

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

_WIDTHS: Final = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.76, 0.72)
"""Shares of a block's range that four to six bits are tried on. Eight bits have codes enough for the whole range."""


def quantize_least_squares(
    weight: FloatArray, block_format: BlockFormat, importance: FloatArray | None = None
) -> QuantizedMatrix:
    """Quantize a weight with the scales of least squared error.

    Args:
        weight: float32 [N, K].
        block_format: Bits, block size and symmetry.
        importance: float32 [K], the weight of each in feature's squared error, such as the mean of its squared
            activations; None weighs all alike.

    Raises:
        UnsupportedModelError: If K is no multiple of the block size.
    """
    rows, blocks = weight.shape[0], block_format.blocks(weight.shape[1])
    codes = np.empty(weight.shape, dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    zero_points: CodeArray = np.empty((rows, blocks), dtype=np.uint8)
    share = np.ones(weight.shape[1], dtype=np.float32) if importance is None else importance
    share = share.reshape(blocks, block_format.block_size)

    def quantize_range(part: slice) -> None:
        values = weight[part].reshape(-1, blocks, block_format.block_size)
        search = _Search(values, share, block_format)
        for width in _WIDTHS if block_format.bits < 8 else _WIDTHS[:1]:
            search.try_width(np.float32(width))
        scales[part], zero_points[part] = search.scales, search.zero_points
        codes[part] = search.codes().reshape(codes[part].shape)

    in_row_ranges(rows, weight.shape[1] * weight.itemsize, quantize_range)
    return QuantizedMatrix(
        format=block_format, codes=codes, scales=scales, zero_points=None if block_format.symmetric else zero_points
    )


class _Search:
    """The best scales and zero points [N, blocks] so far for values [N, blocks, block_size]."""

    def __init__(self, values: FloatArray, share: FloatArray, block_format: BlockFormat) -> None:
        self._values, self._share, self._format = values, share, block_format
        self._lowest = np.minimum(values.min(axis=2), 0)
        self._highest = np.maximum(values.max(axis=2), 0)
        self._error = np.full(self._lowest.shape, np.inf, dtype=np.float32)
        self.scales: FloatArray = np.zeros_like(self._lowest)
        self.zero_points: FloatArray = np.full_like(self._lowest, block_format.default_zero_point)

    def try_width(self, width: np.float32) -> None:
        """Try a share of each block's range, then the best scale for the codes that it gave."""
        form = self._format
        lowest, highest = self._lowest * width, self._highest * width
        if form.symmetric:
            # The lowest code reaches one step further from zero than the highest: it takes the larger extreme.
            extreme = np.where(-lowest > highest, lowest, highest)
            scales = storable_scales(extreme / np.float32(-form.default_zero_point))
            zero_points = np.full_like(scales, form.default_zero_point)
        else:
            scales = storable_scales((highest - lowest) / np.float32(form.max_code))
            zero_points = np.rint(-lowest / nonzero(scales)).clip(0, form.max_code)
        offsets = self._keep(scales, zero_points)
        if form.bits < 8:
            power = np.einsum("nbk,nbk,bk->nb", offsets, offsets, self._share)
            match = np.einsum("nbk,nbk,bk->nb", offsets, self._values, self._share)
            self._keep(storable_scales(np.where(power > 0, match / nonzero(power), scales)), zero_points)

    def codes(self) -> FloatArray:
        """Return the codes of the best scales, [N, blocks, block_size]."""
        return self._offsets(self.scales, self.zero_points) + self.zero_points[:, :, None]

    def _keep(self, scales: FloatArray, zero_points: FloatArray) -> FloatArray:
        """Keep the blocks that are better than before; return the codes less their zero points."""
        offsets = self._offsets(scales, zero_points)
        difference = offsets * scales[:, :, None]
        difference -= self._values
        error = np.einsum("nbk,nbk,bk->nb", difference, difference, self._share)
        better = error < self._error
        self._error = np.where(better, error, self._error)
        self.scales = np.where(better, scales, self.scales)
        self.zero_points = np.where(better, zero_points, self.zero_points)
        return offsets

    def _offsets(self, scales: FloatArray, zero_points: FloatArray) -> FloatArray:
        zero = zero_points[:, :, None]
        offsets = self._values / nonzero(scales)[:, :, None]
        np.rint(offsets, out=offsets)
        return np.clip(offsets, -zero, self._format.max_code - zero, out=offsets)
