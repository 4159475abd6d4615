"""What a package costs in memory, computed from its graph; the agent measures again on the device."""

from __future__ import annotations

from typing import Final

import numpy as np

from lamplighter_agent.package.manifest import MemoryNeeds
from lamplighter_builder.graph import Graph, TensorSpec
from lamplighter_builder.models.decoder import DecoderConfig

PREFILL_CHUNK_TOKENS: Final = 512
_FLOAT_BYTES: Final = 4
_MATRIX_RANK: Final = 3


def memory_needs(config: DecoderConfig, graph: Graph) -> MemoryNeeds:
    """Compute the needs of a graph run in float32 on the CPU."""
    cache_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * _FLOAT_BYTES
    return MemoryNeeds(
        weights_bytes=sum(_resident_bytes(spec) for spec in graph.external().values()),
        kv_bytes_per_token={"float32": cache_bytes},
        prefill_scratch_bytes=_prefill_bytes(config),
        prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
    )


def _resident_bytes(spec: TensorSpec) -> int:
    """Return what an initializer occupies once loaded.

    onnxruntime repacks the codes of ``MatMulNBits`` [N, blocks, bytes] with a copy of the scales and one float32 sum a
    block, rows rounded up to 16, and lets go of the original codes; everything else stays as it is.
    """
    if len(spec.shape) != _MATRIX_RANK or np.dtype(spec.dtype) != np.uint8:
        return spec.nbytes
    rows, blocks, _ = spec.shape
    return spec.nbytes + _FLOAT_BYTES * rows * blocks + _FLOAT_BYTES * -(-rows // 16) * 16 * blocks


def _prefill_bytes(config: DecoderConfig) -> int:
    """Return the widest moment of a layer for one chunk, plus one row of logits.

    Alive at once: the residual stream and its normed copy, and either the projections around attention or gate and up
    (packed, then split) with their product.
    """
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = (heads + config.num_attention_heads) * config.head_dim
    mlp = 5 * config.intermediate_size
    features = 2 * config.hidden_size + max(attention, mlp)
    return _FLOAT_BYTES * (PREFILL_CHUNK_TOKENS * features + config.vocab_size)
