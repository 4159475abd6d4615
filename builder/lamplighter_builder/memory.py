"""What a package costs in memory, computed from its graph; the agent measures again on the device."""

from __future__ import annotations

from typing import Final

import numpy as np

from lamplighter_agent.package.manifest import CacheDtype, MemoryNeeds, ModelFacts
from lamplighter_builder.graph import Graph, TensorSpec, Weight
from lamplighter_builder.targets import GraphTarget

PREFILL_CHUNK_TOKENS: Final = 512
_FLOAT_BYTES: Final = 4
_ROPE_ROWS: Final = 4096
"""Rows of the rotary tables that are counted: tables are mapped, and rows of positions that no text reaches are never
read. The agent's own limit for a context, if none is configured."""
_MATRIX_RANK: Final = 3


def memory_needs(model: ModelFacts, weights_bytes: int, target: GraphTarget, *, head_rows: int = 1) -> MemoryNeeds:
    """Compute the needs of a model on its target; for ``cuda`` and ``dml`` they are the device's memory.

    Args:
        model: Its sizes.
        weights_bytes: What its weights occupy once loaded.
        target: Where it runs.
        head_rows: Rows of a prefill chunk that go through the head.
    """
    features = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return MemoryNeeds(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=_cache_bytes(features, target),
        prefill_scratch_bytes=_prefill_bytes(model, target.float_bytes, head_rows),
        prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
    )


def resident_weights(graph: Graph, target: GraphTarget) -> int:
    """Return the bytes of a graph's weights once loaded."""
    weights = sum(_resident_bytes(weight, spec, target) for weight in graph.weights for spec in weight.outputs)
    aliases = graph.external().keys() - {spec.name for weight in graph.weights for spec in weight.outputs}
    weights += sum(packed_bytes(spec) for spec in graph.computed_tensors())
    return weights + sum(packed_bytes(graph.external()[name]) for name in aliases)


def _resident_bytes(weight: Weight, spec: TensorSpec, target: GraphTarget) -> int:
    """Return what one of a weight's initializers occupies once loaded."""
    stored = target.stored(weight, spec)
    if spec.dtype == np.uint8 and weight.format is not None and len(weight.format.plane_widths) > 1:
        # Planes give way to the codes that are made of them. Zero points stay, a byte a block.
        return 0 if len(spec.shape) == _MATRIX_RANK else spec.nbytes
    if weight.group == "rope":
        return stored.nbytes // spec.shape[0] * min(spec.shape[0], _ROPE_ROWS)
    if target.provider != "cpu":
        return stored.nbytes
    if stored.nbytes == spec.nbytes:
        return packed_bytes(spec)
    # Cast to float32 when loaded; a table that rows are looked up from also stays as it is stored.
    return spec.nbytes + (stored.nbytes if weight.group == "embedding" else 0)


def packed_bytes(spec: TensorSpec) -> int:
    """Return the bytes of an initializer as the CPU's kernels hold it.

    onnxruntime repacks the codes of ``MatMulNBits`` [N, blocks, bytes] with a copy of the scales and one float32 sum a
    block, rows rounded up to 16, and lets go of the original codes; everything else stays as it is.
    """
    if len(spec.shape) != _MATRIX_RANK or np.dtype(spec.dtype) != np.uint8:
        return spec.nbytes
    rows, blocks, _ = spec.shape
    return spec.nbytes + _FLOAT_BYTES * rows * blocks + _FLOAT_BYTES * -(-rows // 16) * 16 * blocks


def _cache_bytes(features: int, target: GraphTarget) -> dict[CacheDtype, int]:
    """Return the bytes of a token by cache dtype; a float32 graph can be run with an int8 cache as well."""
    sizes: dict[CacheDtype, int] = {target.cache_dtype: features * target.float_bytes}
    if target.cache_dtype == "float32":
        sizes["int8"] = features
    return sizes


def _prefill_bytes(model: ModelFacts, float_bytes: int, head_rows: int) -> int:
    """Return the widest moment of a layer for one chunk, plus the rows of logits.

    Alive at once: the residual stream and its normed copy, and either the projections around attention or gate and up
    (packed, then split) with their product.
    """
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    attention = (heads + model.num_attention_heads) * model.head_dim
    mlp = 5 * model.intermediate_size
    features = 2 * model.hidden_size + max(attention, mlp)
    return float_bytes * (PREFILL_CHUNK_TOKENS * features + head_rows * model.vocab_size)
