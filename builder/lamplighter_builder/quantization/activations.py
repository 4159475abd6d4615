"""What the inputs of a matrix on calibration text tell: how its features move together, and what rounding them changes.

Inputs x are [tokens, K]; each token counts by how much the model's output depends on the matrix's output there.
"""

from __future__ import annotations

from typing import Final

import torch

from lamplighter_builder.quantization.blockwise import FloatArray

_NOISE_TOKENS: Final = 2048
"""Tokens that the noise of rounding is measured on, evenly spread: a mean hardly changes with more of them."""

_LARGEST_CODE: Final = 127
_SMALLEST_STEP: Final = 1e-12


def weighted_hessian(x: torch.Tensor, token_weights: torch.Tensor) -> FloatArray:
    """Return the mean of ``w * x.T @ x`` over tokens x [tokens, K] with weights w [tokens]: float32 [K, K]."""
    hessian: FloatArray = ((x * token_weights[:, None]).t() @ x / len(x)).numpy()
    return hessian


def activation_noise(x: torch.Tensor, token_weights: torch.Tensor, block_size: int) -> FloatArray:
    """Return the weighted mean square of what rounding x [tokens, K] to 8 bits in blocks changes: float32 [K].

    Accuracy level 4 of ``MatMulNBits`` rounds activations so, with one scale for each block of each token.
    """
    sample = slice(None, None, -(-len(x) // _NOISE_TOKENS))
    blocks = x[sample].reshape(-1, x.shape[1] // block_size, block_size)
    steps = (blocks.abs().amax(dim=2, keepdim=True) / _LARGEST_CODE).clamp_min(_SMALLEST_STEP)
    error = (blocks / steps).round_().mul_(steps).sub_(blocks).flatten(1)
    noise: FloatArray = (token_weights[sample] @ error.square_() / len(error)).numpy()
    return noise
