"""What ``-p`` means: which linear layers and embeddings a model is given, and how the manifest describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from lamplighter_agent.package.manifest import TensorGroup
from lamplighter_builder.components.embedding import FloatEmbedding, QuantizedEmbeddingFactory
from lamplighter_builder.components.linear import ACCURACY_LEVEL, FloatLinear, QuantizedLinear
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.models.decoder import Parts
from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix
from lamplighter_builder.quantization.rtn import quantize_rtn

PrecisionName = Literal["int4", "fp32"]
INT4_FORMAT: Final = BlockFormat(bits=4, block_size=32, symmetric=True)


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The parts of a model and the description of each group of its weights, without their bytes."""

    name: PrecisionName
    parts: Parts
    groups: Mapping[str, TensorGroup]


def _int4() -> PrecisionPlan:
    def quantize(_name: str, weight: FloatArray) -> QuantizedMatrix:
        return quantize_rtn(weight, INT4_FORMAT)

    linear = QuantizedLinear(INT4_FORMAT, quantize)
    parts = Parts(linear=linear, embedding=QuantizedEmbeddingFactory(INT4_FORMAT, quantize), head=linear)
    groups = {
        name: TensorGroup(
            name=name,
            dtype="uint4",
            bits=INT4_FORMAT.bits,
            block_size=INT4_FORMAT.block_size,
            symmetric=INT4_FORMAT.symmetric,
            accuracy_level=ACCURACY_LEVEL,
        )
        for name in ("embedding", "head", "linear")
    }
    return PrecisionPlan("int4", parts, groups | {name: _float_group(name) for name in ("norm", "bias", "rope")})


def _fp32() -> PrecisionPlan:
    linear = FloatLinear()
    names = ("embedding", "head", "linear", "norm", "bias", "rope")
    return PrecisionPlan("fp32", Parts(linear, FloatEmbedding, linear), {name: _float_group(name) for name in names})


def _float_group(name: str) -> TensorGroup:
    return TensorGroup(name=name, dtype="float32", bits=32)


PRECISIONS: Final[Mapping[PrecisionName, Callable[[], PrecisionPlan]]] = MappingProxyType(
    {"int4": _int4, "fp32": _fp32}
)
