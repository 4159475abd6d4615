"""Linear layers. A model asks a :class:`LinearFactory`; the build's precision decides which one it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from lamplighter_builder.graph import (
    CONTRIB_DOMAIN,
    NO_VALUE,
    Array,
    FloatArray,
    Graph,
    Source,
    TensorSpec,
    Value,
    Weight,
)
from lamplighter_builder.quantization.blockwise import (
    BlockFormat,
    QuantizedMatrix,
    convert_exactly,
    stack_matrices,
)
from lamplighter_builder.quantization.scheme import Scheme

ACCURACY_LEVEL: Final = 4
"""``MatMulNBits`` computes with activations quantized to int8; on the CPU four times as fast as float32."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A linear layer ``y = x @ W.T + b``.

    Attributes:
        name: Module path of the layer, for names of initializers.
        sources: Checkpoint weights [n_i, in_features], stacked along the out features in this order.
        in_features: K.
        out_features: N, the sum of all n_i.
        biases: Checkpoint biases [n_i] stacked likewise, or empty.
        group: Precision group in the manifest.
    """

    name: str
    sources: tuple[Source, ...]
    in_features: int
    out_features: int
    biases: tuple[Source, ...] = ()
    group: str = "linear"


class LinearFactory(Protocol):
    """Emits a linear layer in some precision."""

    def __call__(self, graph: Graph, x: Value, spec: LinearSpec) -> Value:
        """Apply the layer to ``x`` [B, S, in_features] and return [B, S, out_features]."""


def linear_source(module: str, out_features: int, in_features: int) -> Source:
    """Return the source of a module's ``weight``."""
    return Source(f"{module}.weight", (out_features, in_features))


def bias_source(module: str, out_features: int) -> Source:
    """Return the source of a module's ``bias``."""
    return Source(f"{module}.bias", (out_features,))


def module_spec(module: str, in_features: int, out_features: int, *, bias: bool, group: str = "linear") -> LinearSpec:
    """Return the spec of a layer that is one module of the checkpoint."""
    return LinearSpec(
        module,
        (linear_source(module, out_features, in_features),),
        in_features,
        out_features,
        (bias_source(module, out_features),) if bias else (),
        group,
    )


class FloatLinear:
    """``MatMul`` with the weight transposed to [in_features, out_features] at build time, float32."""

    def __call__(self, graph: Graph, x: Value, spec: LinearSpec) -> Value:
        """Apply the layer to ``x`` [B, S, in_features] and return [B, S, out_features]."""
        output = TensorSpec(f"{spec.name}.weight", np.float32, (spec.in_features, spec.out_features))
        (weight,) = graph.weight(Weight(spec.group, spec.sources, (output,), _stack_transposed))
        (y,) = graph.op("MatMul", [x, weight])
        if spec.biases:
            (y,) = graph.op("Add", [y, declare_bias(graph, spec)])
        return y


class QuantizedLinear:
    """``MatMulNBits``: codes uint8 [N, blocks, block_size * bits / 8], scales float32 [N, blocks].

    A layer whose rows are no whole blocks stays as :class:`FloatLinear` has it.

    Args:
        scheme: Chooses format and quantizer of a matrix by the layer's name.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, graph: Graph, x: Value, spec: LinearSpec) -> Value:
        """Apply the layer to ``x`` [B, S, in_features] and return [B, S, out_features]."""
        recipe = self._scheme(spec.name)
        if not recipe.format.fits(spec.in_features):
            return FloatLinear()(graph, x, spec)
        outputs = quantized_specs(spec.name, recipe.format, spec.out_features, spec.in_features)

        def convert(sources: Sequence[FloatArray]) -> list[Array]:
            return quantized_arrays(recipe.quantize(_stack(sources)))

        repack = exact_repacker(recipe.format)
        shape = (spec.out_features, spec.in_features)
        tensors = graph.weight(Weight(spec.group, spec.sources, outputs, convert, repack, recipe.format))
        if len(recipe.format.plane_widths) > 1:
            whole = join_planes(graph, tensors, recipe.format, shape)
            tensors = (as_blocks(graph, whole[0], recipe.format, shape), *whole[1:])
        bias = declare_bias(graph, spec) if spec.biases else None
        return matmul_nbits(graph, x, tensors, recipe.format, shape, bias)


def quantized_specs(
    name: str, block_format: BlockFormat, out_features: int, in_features: int
) -> tuple[TensorSpec, ...]:
    """Return the initializers of a matrix: codes or their planes, scales and, if asymmetric, packed zero points."""
    blocks = block_format.blocks(in_features)
    if len(block_format.plane_widths) > 1:
        specs = [
            TensorSpec(f"{name}.{plane}", np.uint8, (out_features, 1, in_features * width // 8))
            for plane, width in zip(("weight_high_codes", "weight_low_codes"), block_format.plane_widths, strict=True)
        ]
    else:
        packed = block_format.block_size * block_format.bits // 8
        specs = [TensorSpec(f"{name}.weight_codes", np.uint8, (out_features, blocks, packed))]
    specs.append(TensorSpec(f"{name}.weight_scales", np.float32, (out_features, blocks)))
    if not block_format.symmetric:
        width = -(-blocks * block_format.kernel_bits // 8)
        specs.append(TensorSpec(f"{name}.weight_zero_points", np.uint8, (out_features, width)))
    return tuple(specs)


def quantized_arrays(matrix: QuantizedMatrix) -> list[Array]:
    """Return the arrays of :func:`quantized_specs`, in the same order."""
    codes: list[Array] = [matrix.packed_codes()] if len(matrix.format.plane_widths) == 1 else [*matrix.planes()]
    zero_points = matrix.packed_zero_points()
    return [*codes, matrix.scales] if zero_points is None else [*codes, matrix.scales, zero_points]


def join_planes(
    graph: Graph, tensors: Sequence[Value], block_format: BlockFormat, shape: tuple[int, int]
) -> tuple[Value, ...]:
    """Emit how onnxruntime puts codes of 5 or 6 bits together when it loads the model: constants that it computes once.

    Args:
        graph: Graph under construction.
        tensors: Both planes, scales and, if asymmetric, zero points, as declared by :func:`quantized_specs`.
        block_format: Bits, block size and symmetry.
        shape: (N, K).

    Returns:
        Codes uint8 [N, K] of 8 bits, scales and zero points.
    """
    whole = graph.constant(np.array(shape, dtype=np.int64))
    parts: list[Value] = []
    for plane, width in zip(tensors[:2], block_format.plane_widths, strict=True):
        shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, -1, 1)
        (shifted,) = graph.op("BitShift", [plane, graph.constant(shifts)], attributes={"direction": "RIGHT"})
        mask = graph.constant(np.array((1 << width) - 1, dtype=np.uint8))
        parts += graph.op("BitwiseAnd", [shifted, mask])
    low_width = graph.constant(np.array(block_format.plane_widths[1], dtype=np.uint8))
    (high,) = graph.op("Reshape", [parts[0], whole])
    (low,) = graph.op("Reshape", [parts[1], whole])
    (raised,) = graph.op("BitShift", [high, low_width], attributes={"direction": "LEFT"})
    (codes,) = graph.op("BitwiseOr", [raised, low])
    scales, *zero_points = tensors[2:]
    if block_format.symmetric:
        blocks = (shape[0], block_format.blocks(shape[1]))
        (zero_point,) = graph.op(
            "Expand",
            [
                graph.constant(np.array(block_format.default_zero_point, dtype=np.uint8)),
                graph.constant(np.array(blocks, dtype=np.int64)),
            ],
        )
        graph.computed(TensorSpec(zero_point.name, np.uint8, blocks))
        zero_points = [zero_point]
    return codes, scales, *zero_points


def as_blocks(graph: Graph, codes: Value, block_format: BlockFormat, shape: tuple[int, int]) -> Value:
    """Emit the shape that ``MatMulNBits`` reads: from codes [N, K] of 8 bits to [N, blocks, block_size]."""
    blocks = (shape[0], block_format.blocks(shape[1]), block_format.block_size)
    (reshaped,) = graph.op("Reshape", [codes, graph.constant(np.array(blocks, dtype=np.int64))])
    graph.computed(TensorSpec(reshaped.name, np.uint8, blocks))
    return reshaped


def exact_repacker(block_format: BlockFormat) -> Callable[[Sequence[QuantizedMatrix]], list[Array] | None]:
    """Return a ``Weight.repack``: stacks stored matrices along N, in a format that holds the same values."""

    def repack(matrices: Sequence[QuantizedMatrix]) -> list[Array] | None:
        stacked = stack_matrices(matrices)
        exact = None if stacked is None else convert_exactly(stacked, block_format)
        return None if exact is None else quantized_arrays(exact)

    return repack


def matmul_nbits(
    graph: Graph,
    x: Value,
    tensors: Sequence[Value],
    block_format: BlockFormat,
    shape: tuple[int, int],
    bias: Value | None = None,
) -> Value:
    """Emit ``MatMulNBits`` on declared tensors.

    Args:
        graph: Graph under construction.
        x: [B, S, K].
        tensors: Codes, scales and, if asymmetric, zero points.
        block_format: Bits, block size and symmetry.
        shape: (N, K).
        bias: [N] or None.

    Returns:
        [B, S, N].
    """
    inputs = [x, *tensors]
    if bias is not None:
        inputs += [NO_VALUE] * (5 - len(inputs)) + [bias]
    (y,) = graph.op(
        "MatMulNBits",
        inputs,
        domain=CONTRIB_DOMAIN,
        attributes={
            "N": shape[0],
            "K": shape[1],
            "bits": block_format.kernel_bits,
            "block_size": block_format.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
    )
    return y


def declare_bias(graph: Graph, spec: LinearSpec) -> Value:
    """Declare the stacked bias [out_features] of a layer."""
    output = TensorSpec(f"{spec.name}.bias", np.float32, (spec.out_features,))
    (bias,) = graph.weight(Weight("bias", spec.biases, (output,), lambda sources: [_stack(sources)]))
    return bias


def _stack(sources: Sequence[FloatArray]) -> FloatArray:
    return sources[0] if len(sources) == 1 else np.concatenate(list(sources))


def _stack_transposed(sources: Sequence[FloatArray]) -> list[Array]:
    return [np.ascontiguousarray(_stack(sources).T)]
