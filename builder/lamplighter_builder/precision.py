"""What ``-p`` means: which linear layers and embeddings a model is given, and how the manifest describes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.manifest import ExecutionProvider, Precision, TensorGroup
from lamplighter_builder.budget import Budget
from lamplighter_builder.components.embedding import FloatEmbedding, QuantizedEmbeddingFactory
from lamplighter_builder.components.linear import ACCURACY_LEVEL, FloatLinear, QuantizedLinear
from lamplighter_builder.components.moe import FloatExperts, QuantizedExperts
from lamplighter_builder.graph import Graph
from lamplighter_builder.models.decoder import Parts
from lamplighter_builder.quantization.blockwise import BlockFormat
from lamplighter_builder.quantization.least_squares import quantize_least_squares
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.quantization.scheme import Scheme, uniform
from lamplighter_builder.targets import GraphTarget

PrecisionName = Literal["int4", "int8", "fp16", "fp32"]
QuantizerName = Literal["rtn", "least-squares", "gptq"]
INT4_FORMAT: Final = BlockFormat(bits=4, block_size=32, symmetric=False)
"""Zero points cost an eighth of a bit a weight and a fifth less error; on the CPU they cost no time."""

FOREIGN_INT4_FORMAT: Final = BlockFormat(bits=4, block_size=32, symmetric=True)
"""For ``cuda`` and ``dml``, whose fast kernels are those without zero points."""

INT8_FORMAT: Final = BlockFormat(bits=8, block_size=32, symmetric=True)
"""Blocks of 32 as in INT4: the kernel quantizes activations in blocks of the same size, and larger ones lose more there
than the scales cost (one bit a weight). ``Q8_0`` blocks are of this format too."""


def quantized_parts(scheme: Scheme) -> Parts:
    """Return parts whose matrices are quantized as the scheme says; a tied head shares the embedding's bytes."""
    linear = QuantizedLinear(scheme)
    embedding, experts = QuantizedEmbeddingFactory(scheme), QuantizedExperts(scheme)
    return Parts(linear=linear, embedding=embedding, head=linear, experts=experts)


def float_parts() -> Parts:
    """Return parts whose matrices are floats."""
    linear = FloatLinear()
    return Parts(linear=linear, embedding=FloatEmbedding, head=linear, experts=FloatExperts())


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """How matrices are quantized, where the precision is ``int4`` or ``int8``.

    Attributes:
        quantizer: ``rtn`` rounds to nearest; ``least-squares`` searches for each block's scale; ``gptq`` listens to
            the model on calibration text.
        target_bytes: Most bytes of ``model.onnx`` and ``model.onnx.data``; each matrix then gets a format of its own.
        bits_per_weight: The same bound, by weight of the checkpoint.
        max_slowdown: Share by which a decode step may take longer than with plain INT4, see ``Budget``.
        calibration: The user's own calibration texts; empty: the set that comes with the builder.
    """

    quantizer: QuantizerName = "least-squares"
    target_bytes: int | None = None
    bits_per_weight: float | None = None
    max_slowdown: float | None = None
    calibration: tuple[Path, ...] = ()

    def check(self, precision: PrecisionName, provider: ExecutionProvider) -> None:
        """Check that the options agree with each other, with the precision and with the provider.

        Raises:
            ConfigError: If they do not.
        """
        budget = self.target_bytes is not None or self.bits_per_weight is not None
        if self.target_bytes is not None and self.bits_per_weight is not None:
            raise ConfigError("--target-mb and --bits-per-weight name the same bound", hint="give one of them")
        if self.max_slowdown is not None and not budget:
            raise ConfigError("--max-slowdown needs a size to spend", hint="give --target-mb or --bits-per-weight")
        if self.quantizer != "gptq" and (budget or self.calibration):
            raise ConfigError(
                f"--quantizer {self.quantizer} neither listens to calibration text nor keeps to a size",
                hint="use --quantizer gptq with --calibration, --target-mb and --bits-per-weight",
            )
        if budget and (precision, provider) != ("int4", "cpu"):
            raise ConfigError(
                f"-p {precision} -e {provider} has one format for all matrices", hint="give a size with -p int4 -e cpu"
            )
        if self.quantizer == "gptq" and matrix_format(precision, provider) is None:
            raise ConfigError(f"-p {precision} is not quantized", hint="use --quantizer gptq with -p int4 or int8")

    def budget(self, parameters: int) -> Budget | None:
        """Return what a model of so many weights may have, None without a bound on its size."""
        nbytes = self.target_bytes
        if self.bits_per_weight is not None:
            nbytes = int(self.bits_per_weight * parameters / 8)
        return None if nbytes is None else Budget(nbytes, self.max_slowdown)


def matrix_format(precision: PrecisionName, provider: ExecutionProvider) -> BlockFormat | None:
    """Return the format that every matrix has unless a size is asked for; None where nothing is quantized."""
    if precision == "int4":
        return INT4_FORMAT if provider == "cpu" else FOREIGN_INT4_FORMAT
    return INT8_FORMAT if precision == "int8" else None


def uniform_scheme(precision: PrecisionName, provider: ExecutionProvider, quantizer: QuantizerName) -> Scheme | None:
    """Return the scheme that gives every matrix the precision's format; None where nothing is quantized."""
    block_format = matrix_format(precision, provider)
    if block_format is None:
        return None
    return uniform(block_format, quantize_rtn if quantizer == "rtn" else quantize_least_squares)


def choose_parts(scheme: Scheme | None, target: GraphTarget) -> Parts:
    """Return the parts of a model for a target: matrices as the scheme says, floats without one."""
    if scheme is None:
        return float_parts()
    parts = quantized_parts(scheme)
    if target.provider != "cpu":
        # DirectML has no kernel for quantized experts, and CUDA's wants them in an order of its own.
        parts = dataclasses.replace(parts, experts=FloatExperts())
    if target.provider == "dml":
        # Nor one that looks rows of a quantized table up.
        parts = dataclasses.replace(parts, embedding=FloatEmbedding)
    return parts


def choose_target(precision: PrecisionName, provider: ExecutionProvider) -> GraphTarget:
    """Return the target of a build.

    Raises:
        ConfigError: If the provider cannot compute in this precision.
    """
    if provider == "cuda" and precision == "fp32":
        raise ConfigError(
            "-p fp32 -e cuda: onnxruntime's attention for CUDA computes in float16 only",
            hint="choose fp16, int8 or int4, or build fp32 for the CPU",
        )
    half = provider != "cpu" and precision != "fp32"
    return GraphTarget(provider, half_arithmetic=half, half_matrices=half or precision == "fp16")


@dataclass(frozen=True, slots=True)
class _GroupKey:
    """Weights of one group and one format, which the manifest describes together."""

    group: str
    format: BlockFormat | None
    half: bool


def describe_precision(precision: PrecisionName, target: GraphTarget, graph: Graph) -> Precision:
    """Return each group of weights with its format and bytes.

    A group whose weights have several formats is listed once a format, as ``linear`` and ``linear.8bit-32``.
    """
    sizes: dict[_GroupKey, int] = {}
    for weight in graph.weights:
        stored = [target.stored(weight, spec) for spec in weight.outputs]
        half = weight.format is None and stored[0].dtype == np.float16
        key = _GroupKey(weight.group, weight.format, half)
        sizes[key] = sizes.get(key, 0) + sum(spec.nbytes for spec in stored)
    groups: dict[str, TensorGroup] = {}
    for key, size in sizes.items():
        group = _describe(key, size, target)
        name = group.name if group.name not in groups else f"{group.name}.{_format_name(key)}"
        groups[name] = msgspec.structs.replace(group, name=name)
    return Precision(name=precision, groups=tuple(groups.values()))


def _describe(key: _GroupKey, size: int, target: GraphTarget) -> TensorGroup:
    if key.format is None:
        bits = 16 if key.half else 32
        return TensorGroup(name=key.group, dtype=f"float{bits}", bits=bits, length_bytes=size)
    return TensorGroup(
        name=key.group,
        dtype=f"uint{key.format.kernel_bits}",
        bits=key.format.bits,
        block_size=key.format.block_size,
        symmetric=key.format.symmetric,
        accuracy_level=ACCURACY_LEVEL if target.reads_accuracy_level else None,
        length_bytes=size,
    )


def _format_name(key: _GroupKey) -> str:
    if key.format is None:
        return "float16" if key.half else "float32"
    return f"{key.format.bits}bit-{key.format.block_size}"
