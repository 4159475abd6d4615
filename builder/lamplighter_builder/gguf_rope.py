"""Rotary scaling in GGUF metadata and tensors, in the words of a ``config.json``.

llama.cpp stores divisors of the frequencies as tensors: ``rope_freqs`` (Llama 3.1 and later) and
``rope_factors_long`` and ``rope_factors_short`` (LongRoPE).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.components.rope import Llama3Rope, Rope
from lamplighter_builder.fields import Fields

LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
FREQUENCY_FACTORS: Final = "rope_freqs.weight"
FACTOR_TENSORS: Final = frozenset({LONG_FACTORS, SHORT_FACTORS, FREQUENCY_FACTORS})

_LLAMA3_ORIGINAL_CONTEXT: Final = 8192
_LLAMA3_RANGE: Final = (1.0, 4.0)
"""``low_freq_factor`` and ``high_freq_factor`` of every Llama 3 so far."""


def read_rope_parameters(
    metadata: Fields, architecture: str, factors: Mapping[str, tuple[float, ...]], rotary_dim: int
) -> dict[str, object]:
    """Return ``rope_parameters``.

    Args:
        metadata: The file's metadata.
        architecture: Prefix of the keys.
        factors: Contents of the ``FACTOR_TENSORS`` that the file has.
        rotary_dim: Rotated features of a head.

    Raises:
        CheckpointError: If a field is missing, or the factors do not fit the head.
        UnsupportedModelError: If the scaling is of another kind.
    """
    theta = metadata.number(f"{architecture}.rope.freq_base", default=10000.0)
    for name, values in factors.items():
        if len(values) != rotary_dim // 2 or not all(0 < value < float("inf") for value in values):
            raise CheckpointError(
                f"{metadata.origin}: {name} has {len(values)} values, but must have {rotary_dim // 2}, all positive"
            )
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        return {"rope_theta": theta} | _longrope(metadata, architecture, factors)
    if FREQUENCY_FACTORS in factors:
        context = metadata.integer(f"{architecture}.context_length")
        return {"rope_theta": theta} | _divided(factors[FREQUENCY_FACTORS], theta, rotary_dim, context)
    return {"rope_theta": theta} | _scaled(metadata, architecture)


def _scaled(metadata: Fields, architecture: str) -> dict[str, object]:
    prefix = f"{architecture}.rope.scaling"
    kind = metadata.text(f"{prefix}.type", default="none")
    if kind == "none":
        # Files from before 2023-10 have the factor alone.
        scale = metadata.number(f"{architecture}.rope.scale_linear", default=1.0)
        return {"rope_type": "default"} if scale == 1.0 else {"rope_type": "linear", "factor": scale}
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number(f"{prefix}.factor")}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{metadata.origin}: {prefix}.type {kind!r} is not supported", hint="supported are: none, linear, yarn"
        )
    found: dict[str, object] = {
        "rope_type": "yarn",
        "factor": metadata.number(f"{prefix}.factor"),
        "original_max_position_embeddings": metadata.integer(f"{prefix}.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f"{prefix}.yarn_{name}"):
            found[name] = metadata.number(f"{prefix}.yarn_{name}")
    return found


def _longrope(metadata: Fields, architecture: str, factors: Mapping[str, tuple[float, ...]]) -> dict[str, object]:
    missing = {LONG_FACTORS, SHORT_FACTORS} - factors.keys()
    if missing:
        raise CheckpointError(f"{metadata.origin}: tensor {missing.pop()} is missing")
    prefix = f"{architecture}.rope.scaling"
    return {
        "rope_type": "longrope",
        "long_factor": list(factors[LONG_FACTORS]),
        "short_factor": list(factors[SHORT_FACTORS]),
        "original_max_position_embeddings": metadata.integer(f"{prefix}.original_context_length"),
        "attention_factor": metadata.number(f"{prefix}.attn_factor", default=1.0),
    }


def _divided(factors: tuple[float, ...], theta: float, rotary_dim: int, context: int) -> dict[str, object]:
    """Name divisors that the file gives as they are: ``llama3`` where they are its, else both sides of a LongRoPE."""
    values = np.array(factors)
    if (values == 1).all():
        return {"rope_type": "default"}
    low, high = _LLAMA3_RANGE
    published = Llama3Rope(theta, rotary_dim, float(values.max()), low, high, _LLAMA3_ORIGINAL_CONTEXT)
    if np.allclose(Rope(theta, rotary_dim).frequencies() / published.frequencies(), values, rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": float(values.max()),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        }
    return {
        "rope_type": "longrope",
        "long_factor": list(factors),
        "short_factor": list(factors),
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }
