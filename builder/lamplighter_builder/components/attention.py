"""Self-attention over a key-value cache with ``GroupQueryAttention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import onnx

from lamplighter_builder.components.linear import LinearFactory, LinearSpec, bias_source, linear_source
from lamplighter_builder.components.rope import RopeTables
from lamplighter_builder.graph import CONTRIB_DOMAIN, NO_VALUE, Graph, Value

_INT32: Final = int(onnx.TensorProto.INT32)


class CacheLengths(NamedTuple):
    """What the operator must know about the cache, the same for every layer.

    Attributes:
        seqlens_k: int32 [B], tokens of each row counting the new ones, minus one.
        total: int32 [1], length of the longest row counting the new tokens.
    """

    seqlens_k: Value
    total: Value


class LayerCache(NamedTuple):
    """Key and value of one layer, [B, num_key_value_heads, S_max, head_dim] each."""

    key: Value
    value: Value


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of an attention layer in Hugging Face's words.

    ``bias`` is that of query, key and value, ``output_bias`` that of the output projection.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False


def cache_lengths(graph: Graph, attention_mask: Value) -> CacheLengths:
    """Compute the lengths once from ``attention_mask`` int64 [B, T], whose rows are ones, then zeros."""
    with graph.scope("cache_lengths"):
        axis = graph.constant(np.array([1], dtype=np.int64))
        (tokens,) = graph.op("ReduceSum", [attention_mask, axis], attributes={"keepdims": 0})  # [B]
        (tokens32,) = graph.op("Cast", [tokens], attributes={"to": _INT32})
        (seqlens_k,) = graph.op("Sub", [tokens32, graph.constant(np.array([1], dtype=np.int32))])
        (length,) = graph.op("Shape", [attention_mask], attributes={"start": 1, "end": 2})  # [1]
        (total,) = graph.op("Cast", [length], attributes={"to": _INT32})
    return CacheLengths(seqlens_k, total)


class Attention:
    """Packed query, key and value projection, rotary attention, output projection.

    ::

        x ─ qkv_proj ─ GroupQueryAttention ─ o_proj ─ y
                         │            │
                    past key, value   present key, value

    Args:
        name: Module path, for example ``model.layers.0.self_attn``.
        shape: Sizes.
        linear: Makes the projections.
    """

    def __init__(self, name: str, shape: AttentionShape, linear: LinearFactory) -> None:
        self._name, self._shape, self._linear = name, shape, linear

    def __call__(
        self, graph: Graph, x: Value, lengths: CacheLengths, rope: RopeTables, past: LayerCache
    ) -> tuple[Value, LayerCache]:
        """Attend from ``x`` [B, S, hidden_size] to the cache and to ``x`` itself.

        Returns:
            Hidden states [B, S, hidden_size] and the cache with the new tokens.
        """
        shape = self._shape
        with graph.scope("qkv_proj"):
            qkv = self._linear(graph, x, self._qkv_spec())
        attended, *present = graph.op(
            "GroupQueryAttention",
            [qkv, NO_VALUE, NO_VALUE, past.key, past.value, lengths.seqlens_k, lengths.total, rope.cos, rope.sin],
            domain=CONTRIB_DOMAIN,
            attributes={
                "num_heads": shape.num_attention_heads,
                "kv_num_heads": shape.num_key_value_heads,
                "do_rotary": 1,
            },
            count=3,
        )
        with graph.scope("o_proj"):
            return self._linear(graph, attended, self._output_spec()), LayerCache(*present)

    def _qkv_spec(self) -> LinearSpec:
        shape = self._shape
        heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        parts = [
            (f"{self._name}.{part}_proj", count * shape.head_dim) for part, count in zip("qkv", heads, strict=True)
        ]
        return LinearSpec(
            f"{self._name}.qkv_proj",
            tuple(linear_source(module, size, shape.hidden_size) for module, size in parts),
            shape.hidden_size,
            sum(size for _, size in parts),
            tuple(bias_source(module, size) for module, size in parts) if shape.bias else (),
        )

    def _output_spec(self) -> LinearSpec:
        shape, module = self._shape, f"{self._name}.o_proj"
        width = shape.num_attention_heads * shape.head_dim
        return LinearSpec(
            module,
            (linear_source(module, shape.hidden_size, width),),
            width,
            shape.hidden_size,
            (bias_source(module, shape.hidden_size),) if shape.output_bias else (),
        )
