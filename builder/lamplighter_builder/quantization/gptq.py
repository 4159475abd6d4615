"""GPTQ: each feature's rounding error is made up for by the features that are rounded after it.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers* (2022). Features go
from the largest to the smallest diagonal of the Hessian, and every block keeps the scale and zero point that least
squares gave it (``static groups``), so that no index of features is stored, which would cost the kernels their fast
path. At the end the scales of a row are solved for together, for the codes that were found.

What an error adds to the features after it is read off ``H = M @ D @ M.T``, M upper and unit, as in Chee et al., *QuIP:
2-Bit Quantization of Large Language Models With Guarantees* (2023), who prove that it comes to the same. It takes one
factorization, where the inverse of H and its factor take four times the work.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray, QuantizedMatrix, storable_scales
from lamplighter_builder.quantization.least_squares import quantize_least_squares

_DAMPING: Final = 0.01
"""Share of the mean diagonal added to it: little calibration text leaves the Hessian nearly singular."""

_STRIDE: Final = 64
"""Features after which errors reach the rest of the row; in between they stay within the stride."""

_MAX_SOLVE_ELEMENTS: Final = 32_000_000
"""Numbers held at once while scales are solved for: the more rows, the seldomer is the whole Hessian read."""

_MAX_RESCALE: Final = 4.0


def quantize_gptq(weight: FloatArray, block_format: BlockFormat, hessian: FloatArray) -> QuantizedMatrix:
    """Quantize a weight so that its product with the calibration's activations changes least.

    Args:
        weight: float32 [N, K].
        block_format: Bits, block size and symmetry.
        hessian: float32 [K, K], the mean of ``x.T @ x`` over activations x [1, K], perhaps weighted by token.

    Raises:
        UnsupportedModelError: If K is no multiple of the block size.
    """
    damped = damp(torch.from_numpy(hessian))
    importance = damped.diagonal().numpy()
    start = quantize_least_squares(weight, block_format, importance)
    zero_points = _zero_points(start)
    codes = _propagate(torch.from_numpy(weight), start, zero_points, damped)
    scales = _refit_scales(torch.from_numpy(weight), codes - _per_feature(zero_points, start), start, damped)
    return QuantizedMatrix(
        format=block_format,
        codes=codes.to(torch.uint8).numpy(),
        scales=scales,
        zero_points=start.zero_points,
    )


def conditional_variance(hessian: FloatArray) -> FloatArray:
    """Return for each feature what a squared unit of its rounding error costs once later features made up for it.

    It is the diagonal of D in ``H = M @ D @ M.T``, M upper and unit, in GPTQ's order of features: [K], float32.
    """
    damped = damp(torch.from_numpy(hessian))
    order = _order(damped)
    variance = torch.empty(len(order))
    variance[order] = _upper_factor(damped, order).diagonal().square().float()
    return variance.numpy()


def damp(hessian: torch.Tensor) -> torch.Tensor:
    """Return a Hessian that can be inverted, [K, K]; a feature that was never active counts as an average one."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    active = diagonal > 0
    mean = diagonal[active].mean() if bool(active.any()) else torch.tensor(1.0)
    diagonal[~active] = mean
    diagonal += _DAMPING * mean
    return damped


def _order(damped: torch.Tensor) -> torch.Tensor:
    return torch.argsort(damped.diagonal(), descending=True, stable=True)


def _upper_factor(damped: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper V of ``H = V @ V.T``, H with its features in an order: [K, K], computed in float64."""
    backwards = order.flip(0)
    lower: torch.Tensor = torch.linalg.cholesky(damped[backwards[:, None], backwards].double())
    return lower.flip(0, 1)


def _zero_points(matrix: QuantizedMatrix) -> torch.Tensor:
    if matrix.zero_points is None:
        return torch.full(matrix.scales.shape, float(matrix.format.default_zero_point))
    return torch.from_numpy(matrix.zero_points.astype(np.float32))


def _per_feature(values: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
    return values.repeat_interleave(matrix.format.block_size, dim=1)


def _propagate(
    weight: torch.Tensor, start: QuantizedMatrix, zero_points: torch.Tensor, damped: torch.Tensor
) -> torch.Tensor:
    """Round feature by feature and spread each error; return the codes, float32 [N, K]."""
    order = _order(damped)
    upper = _upper_factor(damped, order)
    spread = (upper / upper.diagonal()).float()
    del upper
    blocks = torch.div(order, start.format.block_size, rounding_mode="floor").tolist()
    # Features first: every step below works on whole rows of memory.
    wanted = weight.t()[order].contiguous()
    rest = wanted.clone()
    scales = torch.from_numpy(start.scales).t().contiguous()
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = zero_points.t().contiguous()
    top = float(start.format.max_code)
    found = torch.empty_like(rest)
    for begin in range(0, len(rest), _STRIDE):
        end = min(begin + _STRIDE, len(rest))
        part, errors = rest[begin:end], torch.empty_like(rest[begin:end])
        factor = spread[begin:end, begin:end]
        for index in range(end - begin):
            block = blocks[begin + index]
            code = (part[index] / divisors[block]).round_().add_(zeros[block]).clamp_(0.0, top)
            found[begin + index] = code
            errors[index] = wanted[begin + index] - (code - zeros[block]) * scales[block]
            part[index + 1 :].addr_(factor[index, index + 1 :], errors[index])
        rest[end:].addmm_(spread[begin:end, end:].t(), errors)
    codes = torch.empty_like(found)
    codes[order] = found
    return codes.t().contiguous()


def _refit_scales(
    weight: torch.Tensor, offsets: torch.Tensor, start: QuantizedMatrix, damped: torch.Tensor
) -> FloatArray:
    """Return the scales [N, blocks] of least error under the Hessian for codes less zero points [N, K].

    A row's scales are coupled by the Hessian: one linear system a row, a little drawn towards the scales at hand.
    """
    before = torch.from_numpy(start.scales)
    blocks, size = before.shape[1], start.format.block_size
    target = ((weight @ damped) * offsets).view(-1, blocks, size).sum(2)
    scales = torch.empty_like(before)
    step = max(1, _MAX_SOLVE_ELEMENTS // (blocks * weight.shape[1]))
    for begin in range(0, len(weight), step):
        rows = slice(begin, begin + step)
        part = offsets[rows].view(-1, blocks, size)
        image = torch.einsum("nbk,bkj->nbj", part, damped.view(blocks, size, -1))
        system = torch.einsum("nbck,nck->nbc", image.view(-1, blocks, blocks, size), part)
        diagonal = system.diagonal(dim1=1, dim2=2)
        pull = 1e-4 * diagonal.mean(dim=1, keepdim=True) + 1e-12
        diagonal += pull
        scales[rows] = torch.linalg.solve(system, target[rows] + pull * before[rows])
    # A block whose codes are all zero says nothing about its scale.
    kept = scales.isfinite() & (scales.abs() <= _MAX_RESCALE * before.abs())
    return storable_scales(torch.where(kept, scales, before).numpy())
