"""Token embeddings, which may also serve as the head: then both read one stored copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lamplighter_builder.components.linear import (
    as_blocks,
    exact_repacker,
    join_planes,
    matmul_nbits,
    quantized_arrays,
    quantized_specs,
)
from lamplighter_builder.graph import CONTRIB_DOMAIN, Array, FloatArray, Graph, Source, TensorSpec, Value, Weight
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.quantization.scheme import MatrixRecipe, Scheme


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """An embedding table [vocab_size, hidden_size]; ``name`` is its module path."""

    name: str
    vocab_size: int
    hidden_size: int

    @property
    def source(self) -> Source:
        """The checkpoint tensor."""
        return Source(f"{self.name}.weight", (self.vocab_size, self.hidden_size))


class Embedding(Protocol):
    """An embedding declared in a graph."""

    def lookup(self, graph: Graph, token_ids: Value) -> Value:
        """From token ids int64 [B, S] to hidden states [B, S, hidden_size]."""

    def project(self, graph: Graph, hidden: Value) -> Value:
        """From hidden states [B, S, hidden_size] to logits [B, S, vocab_size] with the same table (tied head)."""


class EmbeddingFactory(Protocol):
    """Declares an embedding in some precision."""

    def __call__(self, graph: Graph, spec: EmbeddingSpec) -> Embedding:
        """Declare the table's weight."""


class FloatEmbedding:
    """float32 table: ``Gather``; tied head as ``FusedMatMul`` with a transposed right side."""

    def __init__(self, graph: Graph, spec: EmbeddingSpec) -> None:
        output = TensorSpec(f"{spec.name}.weight", np.float32, (spec.vocab_size, spec.hidden_size))
        (self._table,) = graph.weight(Weight("embedding", (spec.source,), (output,), lambda sources: [sources[0]]))

    def lookup(self, graph: Graph, token_ids: Value) -> Value:
        """From token ids int64 [B, S] to hidden states [B, S, hidden_size]."""
        (hidden,) = graph.op("Gather", [self._table, token_ids])
        return hidden

    def project(self, graph: Graph, hidden: Value) -> Value:
        """From hidden states [B, S, hidden_size] to logits [B, S, vocab_size]."""
        (logits,) = graph.op("FusedMatMul", [hidden, self._table], domain=CONTRIB_DOMAIN, attributes={"transB": 1})
        return logits


class QuantizedEmbedding:
    """``GatherBlockQuantized`` on the blob that a tied head reads as ``MatMulNBits``."""

    def __init__(self, graph: Graph, spec: EmbeddingSpec, recipe: MatrixRecipe) -> None:
        self._format = recipe.format
        self._shape = (spec.vocab_size, spec.hidden_size)
        self._specs = quantized_specs(spec.name, recipe.format, *self._shape)
        exactly = exact_repacker(recipe.format)

        def as_tables(arrays: Sequence[Array]) -> list[Array]:
            return [array.reshape(table.shape) for array, table in zip(arrays, tables, strict=True)]

        def convert(sources: Sequence[FloatArray]) -> list[Array]:
            return as_tables(quantized_arrays(recipe.quantize(sources[0])))

        def repack(sources: Sequence[QuantizedMatrix]) -> list[Array] | None:
            arrays = exactly(sources)
            return None if arrays is None else as_tables(arrays)

        codes, *rest = self._specs
        joined = len(recipe.format.plane_widths) > 1
        table = TensorSpec(codes.name, codes.dtype, (spec.vocab_size, codes.nbytes // spec.vocab_size))
        tables = self._specs if joined else (table, *rest)
        tensors = graph.weight(Weight("embedding", (spec.source,), tables, convert, repack, recipe.format))
        if joined:
            tensors = join_planes(graph, tensors, recipe.format, self._shape)
            graph.computed(TensorSpec(tensors[0].name, np.uint8, self._shape))
        self._tensors = tensors

    def lookup(self, graph: Graph, token_ids: Value) -> Value:
        """From token ids int64 [B, S] to hidden states [B, S, hidden_size]."""
        table, *rest = self._tensors
        (hidden,) = graph.op(
            "GatherBlockQuantized",
            [table, token_ids, *rest],
            domain=CONTRIB_DOMAIN,
            attributes={
                "bits": self._format.kernel_bits,
                "block_size": self._format.block_size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
        )
        return hidden

    def project(self, graph: Graph, hidden: Value) -> Value:
        """From hidden states [B, S, hidden_size] to logits [B, S, vocab_size]."""
        table, *rest = self._tensors
        if len(self._format.plane_widths) > 1:
            codes = as_blocks(graph, table, self._format, self._shape)
        else:
            spec = self._specs[0]
            codes = graph.alias(TensorSpec(f"{spec.name}_as_matrix", spec.dtype, spec.shape), of=table)
        return matmul_nbits(graph, hidden, [codes, *rest], self._format, self._shape)


class QuantizedEmbeddingFactory:
    """Declares :class:`QuantizedEmbedding`, or :class:`FloatEmbedding` where a row is no whole blocks.

    Args:
        scheme: Chooses format and quantizer by the table's name.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, graph: Graph, spec: EmbeddingSpec) -> Embedding:
        """Declare the table's weight."""
        recipe = self._scheme(spec.name)
        if not recipe.format.fits(spec.hidden_size):
            return FloatEmbedding(graph, spec)
        return QuantizedEmbedding(graph, spec, recipe)
