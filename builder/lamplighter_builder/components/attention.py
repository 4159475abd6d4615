"""Self-attention over a key-value cache with ``GroupQueryAttention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np
import onnx

from lamplighter_builder.components.linear import (
    LinearFactory,
    LinearSpec,
    bias_source,
    linear_source,
    module_spec,
)
from lamplighter_builder.components.norm import Norm, Stream
from lamplighter_builder.components.rope import RopeTables
from lamplighter_builder.graph import CONTRIB_DOMAIN, NO_VALUE, Attribute, Graph, Value

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
    """Sizes and options of an attention layer.

    Attributes:
        hidden_size: In and out features.
        num_attention_heads: Heads of the query.
        num_key_value_heads: Heads of key and value.
        head_dim: Features of a head.
        bias: True if the projections of query, key and value have biases.
        output_bias: True if the output projection has one.
        window: Tokens that a token sees, itself counted; None for all before it.
        scale: Factor of the scores; None for ``1 / sqrt(head_dim)``.
        softcap: Scores are bounded to it by ``softcap * tanh(score / softcap)``; None for no bound.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


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
        shape: Sizes and options.
        linear: Makes the projections.
    """

    output_module: ClassVar[str] = "o_proj"
    """Name of the output projection in the checkpoint."""

    rotates: ClassVar[bool] = True
    """True if queries and keys are rotated by their positions."""

    def __init__(self, name: str, shape: AttentionShape, linear: LinearFactory) -> None:
        self.name, self.shape, self.linear = name, shape, linear

    def __call__(
        self, graph: Graph, x: Value, lengths: CacheLengths, rope: RopeTables, past: LayerCache
    ) -> tuple[Value, LayerCache]:
        """Attend from ``x`` [B, S, hidden_size] to the cache and to ``x`` itself.

        Returns:
            Hidden states [B, S, hidden_size] and the cache with the new tokens.
        """
        with graph.scope("qkv_proj"):
            qkv = self.linear(graph, x, self.qkv_spec())
        heads = self.make_heads(graph, qkv)
        inputs = [*heads, past.key, past.value, lengths.seqlens_k, lengths.total, *self.rotary_inputs(rope)]
        attended, *present = graph.op(
            "GroupQueryAttention", inputs, domain=CONTRIB_DOMAIN, attributes=self._attributes(), count=3
        )
        with graph.scope("o_proj"):
            return self.linear(graph, attended, self.output_spec()), LayerCache(*present)

    def make_heads(self, graph: Graph, qkv: Value) -> tuple[Value, Value, Value]:
        """Return what attends: the packed projection alone, or query, key and value [B, S, heads * head_dim]."""
        return qkv, NO_VALUE, NO_VALUE

    def rotary_inputs(self, rope: RopeTables) -> list[Value]:
        """Return what the operator rotates queries and keys with; nothing if it does not."""
        return [rope.cos, rope.sin, *([] if rope.position_ids == NO_VALUE else [rope.position_ids])]

    def qkv_spec(self) -> LinearSpec:
        """Return the packed projection of query, key and value."""
        shape, widths = self.shape, self.head_widths()
        parts = [(f"{self.name}.{part}_proj", width) for part, width in zip("qkv", widths, strict=True)]
        return LinearSpec(
            f"{self.name}.qkv_proj",
            tuple(linear_source(module, width, shape.hidden_size) for module, width in parts),
            shape.hidden_size,
            sum(widths),
            tuple(bias_source(module, width) for module, width in parts) if shape.bias else (),
        )

    def output_spec(self) -> LinearSpec:
        """Return the output projection."""
        shape, module = self.shape, f"{self.name}.{self.output_module}"
        return module_spec(module, self.head_widths()[0], shape.hidden_size, bias=shape.output_bias)

    def head_widths(self) -> tuple[int, int, int]:
        """Return the features of query, key and value, all heads together."""
        shape = self.shape
        key_width = shape.num_key_value_heads * shape.head_dim
        return shape.num_attention_heads * shape.head_dim, key_width, key_width

    def _attributes(self) -> dict[str, Attribute]:
        shape = self.shape
        attributes: dict[str, Attribute] = {
            "num_heads": shape.num_attention_heads,
            "kv_num_heads": shape.num_key_value_heads,
            "do_rotary": int(self.rotates),
        }
        if shape.window is not None:
            attributes["local_window_size"] = shape.window
        if shape.scale is not None:
            attributes["scale"] = shape.scale
        if shape.softcap is not None:
            attributes["softcap"] = shape.softcap
        return attributes


class UnrotatedAttention(Attention):
    """Attention that knows of positions only which is before which (NoPE, arXiv 2305.19466)."""

    rotates: ClassVar[bool] = False

    def rotary_inputs(self, _rope: RopeTables) -> list[Value]:
        """Return what the operator rotates queries and keys with: nothing."""
        return []


class FusedAttention(Attention):
    """Attention whose checkpoint holds query, key and value as one tensor ``qkv_proj``."""

    def qkv_spec(self) -> LinearSpec:
        """Return the packed projection of query, key and value."""
        return module_spec(
            f"{self.name}.qkv_proj", self.shape.hidden_size, sum(self.head_widths()), bias=self.shape.bias
        )


class NormedAttention(Attention):
    """Attention that norms each head of query and key before the rotation.

    The operator's own norm inputs are refused on the CPU, so the norms are nodes before it.

    Args:
        name: Module path.
        shape: Sizes and options.
        linear: Makes the projections.
        query_norm: Norm over head_dim.
        key_norm: Norm over head_dim.
    """

    def __init__(
        self, name: str, shape: AttentionShape, linear: LinearFactory, query_norm: Norm, key_norm: Norm
    ) -> None:
        super().__init__(name, shape, linear)
        self._query_norm, self._key_norm = query_norm, key_norm

    def make_heads(self, graph: Graph, qkv: Value) -> tuple[Value, Value, Value]:
        """Return normed query and key, and value, [B, S, heads * head_dim] each."""
        widths = graph.constant(np.array(self.head_widths(), dtype=np.int64))
        query, key, value = graph.op("Split", [qkv, widths], attributes={"axis": -1}, count=3)
        with graph.scope("q_norm"):
            query = self._norm_heads(graph, query, self._query_norm)
        with graph.scope("k_norm"):
            key = self._norm_heads(graph, key, self._key_norm)
        return query, key, value

    def _norm_heads(self, graph: Graph, packed: Value, norm: Norm) -> Value:
        """Norm each head of [B, S, heads * head_dim]."""
        split = graph.constant(np.array([0, 0, -1, self.shape.head_dim], dtype=np.int64))
        (heads,) = graph.op("Reshape", [packed, split])
        normed, _ = norm(graph, Stream(heads))
        (joined,) = graph.op("Reshape", [normed, graph.constant(np.array([0, 0, -1], dtype=np.int64))])
        return joined
