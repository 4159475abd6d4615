"""What ``-p`` means: which linear layers and embeddings a model is given, and how the manifest describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from lamplighter_agent.package.manifest import Precision, TensorGroup
from lamplighter_builder.components.embedding import FloatEmbedding, QuantizedEmbeddingFactory
from lamplighter_builder.components.linear import ACCURACY_LEVEL, FloatLinear, QuantizedLinear
from lamplighter_builder.graph import Graph
from lamplighter_builder.models.decoder import Parts
from lamplighter_builder.quantization.blockwise import BlockFormat
from lamplighter_builder.quantization.scheme import Scheme, uniform_rtn

PrecisionName = Literal["int4", "int8", "fp32"]
INT4_FORMAT: Final = BlockFormat(bits=4, block_size=32, symmetric=True)
INT8_FORMAT: Final = BlockFormat(bits=8, block_size=32, symmetric=True)
"""Blocks of 32 as in INT4: the kernel quantizes activations in blocks of the same size, and larger ones lose more there
than the scales cost (one bit a weight). ``Q8_0`` blocks are of this format too."""


def quantized_parts(scheme: Scheme) -> Parts:
    """Return parts whose matrices are quantized as the scheme says; a tied head shares the embedding's bytes."""
    linear = QuantizedLinear(scheme)
    return Parts(linear=linear, embedding=QuantizedEmbeddingFactory(scheme), head=linear)


def float_parts() -> Parts:
    """Return parts whose matrices are floats."""
    linear = FloatLinear()
    return Parts(linear=linear, embedding=FloatEmbedding, head=linear)


PRECISIONS: Final[Mapping[PrecisionName, Callable[[], Parts]]] = MappingProxyType(
    {
        "int4": lambda: quantized_parts(uniform_rtn(INT4_FORMAT)),
        "int8": lambda: quantized_parts(uniform_rtn(INT8_FORMAT)),
        "fp32": float_parts,
    }
)


@dataclass(frozen=True, slots=True)
class _GroupKey:
    """Weights of one group and one format, which the manifest describes together."""

    group: str
    format: BlockFormat | None


def describe_precision(name: PrecisionName, graph: Graph) -> Precision:
    """Return each group of weights with its format and bytes.

    A group whose weights have several formats is listed once a format, as ``linear`` and ``linear.8bit-32``.
    """
    sizes: dict[_GroupKey, int] = {}
    for weight in graph.weights:
        key = _GroupKey(weight.group, weight.format)
        sizes[key] = sizes.get(key, 0) + sum(spec.nbytes for spec in weight.outputs)
    groups: dict[str, TensorGroup] = {}
    for key, size in sizes.items():
        group_name = key.group
        if group_name in groups and key.format is not None:
            group_name = f"{key.group}.{key.format.bits}bit-{key.format.block_size}"
        elif group_name in groups:
            group_name = f"{key.group}.float"
        groups[group_name] = _describe(group_name, key.format, size)
    return Precision(name=name, groups=tuple(groups.values()))


def _describe(name: str, block_format: BlockFormat | None, size: int) -> TensorGroup:
    if block_format is None:
        return TensorGroup(name=name, dtype="float32", bits=32, length_bytes=size)
    return TensorGroup(
        name=name,
        dtype=f"uint{block_format.bits}",
        bits=block_format.bits,
        block_size=block_format.block_size,
        symmetric=block_format.symmetric,
        accuracy_level=ACCURACY_LEVEL,
        length_bytes=size,
    )
