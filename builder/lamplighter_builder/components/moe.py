"""Mixtures of experts: several gated MLPs a layer, of which each token takes a few.

The mixture's weights [T, num_experts] hold how much of each expert a token takes, 0 for those it does not; T counts the
tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.components.linear import (
    ACCURACY_LEVEL,
    FloatLinear,
    linear_source,
    module_spec,
    quantized_arrays,
)
from lamplighter_builder.components.mlp import Activation, silu
from lamplighter_builder.graph import (
    CONTRIB_DOMAIN,
    NO_VALUE,
    Array,
    Attribute,
    FloatArray,
    Graph,
    Source,
    TensorSpec,
    Value,
    Weight,
)
from lamplighter_builder.quantization.blockwise import QuantizedMatrix, convert_exactly
from lamplighter_builder.quantization.scheme import Scheme

EXPERTS_PER_TOKEN: Final = 2


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Experts ``down(activation(gate(x)) * up(x))``, whose checkpoint names gate, down and up ``w1``, ``w2``, ``w3``.

    Attributes:
        name: Module path, for example ``model.layers.0.block_sparse_moe.experts``.
        num_experts: How many there are.
        hidden_size: In and out features.
        intermediate_size: Features between.
        activation: Function of the gate.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation

    def gate_up_sources(self) -> tuple[Source, ...]:
        """Return gate and up of each expert in turn."""
        return tuple(
            linear_source(f"{self.name}.{expert}.{part}", self.intermediate_size, self.hidden_size)
            for expert in range(self.num_experts)
            for part in ("w1", "w3")
        )

    def down_sources(self) -> tuple[Source, ...]:
        """Return down of each expert."""
        return tuple(
            linear_source(f"{self.name}.{expert}.w2", self.hidden_size, self.intermediate_size)
            for expert in range(self.num_experts)
        )


class ExpertsFactory(Protocol):
    """Emits the experts of a layer in some precision."""

    def __call__(self, graph: Graph, x: Value, weights: Value, spec: ExpertsSpec) -> Value:
        """From ``x`` [B, S, hidden_size] and the mixture's weights [T, num_experts] to [B, S, hidden_size]."""


class FloatExperts:
    """float32: every expert computes every token, and the weights drop what a token does not take."""

    def __call__(self, graph: Graph, x: Value, weights: Value, spec: ExpertsSpec) -> Value:
        """From ``x`` [B, S, hidden_size] and the mixture's weights [T, num_experts] to [B, S, hidden_size]."""
        rows = graph.constant(np.array([1, -1, spec.hidden_size], dtype=np.int64))
        (tokens,) = graph.op("Reshape", [x, rows])  # [1, T, hidden_size]
        (gate_up,) = graph.op("MatMul", [tokens, self._gate_up(graph, spec)])
        gate, up = graph.op("Split", [gate_up], attributes={"axis": -1, "num_outputs": 2}, count=2)
        (product,) = graph.op("Mul", [spec.activation(graph, gate), up])
        (down,) = graph.op("MatMul", [product, self._down(graph, spec)])  # [num_experts, T, hidden_size]
        (by_expert,) = graph.op("Transpose", [weights], attributes={"perm": [1, 0]})
        (shares,) = graph.op("Unsqueeze", [by_expert, graph.constant(np.array([2], dtype=np.int64))])
        (weighted,) = graph.op("Mul", [down, shares])
        axis = graph.constant(np.array([0], dtype=np.int64))
        (mixed,) = graph.op("ReduceSum", [weighted, axis], attributes={"keepdims": 0})
        (shape,) = graph.op("Shape", [x])
        (y,) = graph.op("Reshape", [mixed, shape])
        return y

    @staticmethod
    def _gate_up(graph: Graph, spec: ExpertsSpec) -> Value:
        shape = (spec.num_experts, spec.hidden_size, 2 * spec.intermediate_size)

        def convert(sources: Sequence[FloatArray]) -> list[Array]:
            stacked: FloatArray = np.empty(shape, dtype=np.float32)
            for index, source in enumerate(sources):  # one expert in memory at a time
                begin = index % 2 * spec.intermediate_size
                stacked[index // 2, :, begin : begin + spec.intermediate_size] = source.T
            return [stacked]

        output = TensorSpec(f"{spec.name}.gate_up.weight", np.float32, shape)
        (weight,) = graph.weight(Weight("experts", spec.gate_up_sources(), (output,), convert))
        return weight

    @staticmethod
    def _down(graph: Graph, spec: ExpertsSpec) -> Value:
        shape = (spec.num_experts, spec.intermediate_size, spec.hidden_size)

        def convert(sources: Sequence[FloatArray]) -> list[Array]:
            stacked: FloatArray = np.empty(shape, dtype=np.float32)
            for expert, source in zip(stacked, sources, strict=True):
                expert[:] = source.T
            return [stacked]

        output = TensorSpec(f"{spec.name}.down.weight", np.float32, shape)
        (weight,) = graph.weight(Weight("experts", spec.down_sources(), (output,), convert))
        return weight


class QuantizedExperts:
    """``QMoE``: only the experts that a token takes are computed. Matrices whose rows are no whole blocks stay floats.

    Codes are uint8 [num_experts, N, K * bits / 8], scales float32 [num_experts, N, blocks]; the rows of gate and up
    take turns, which is the layout that the CPU kernel knows.

    Args:
        scheme: Chooses the format of all experts of a layer by its name with ``.gate_up`` and ``.down``.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, graph: Graph, x: Value, weights: Value, spec: ExpertsSpec) -> Value:
        """From ``x`` [B, S, hidden_size] and the mixture's weights [T, num_experts] to [B, S, hidden_size].

        Raises:
            UnsupportedModelError: If the activation is not SiLU, or the formats of the two matrices do not go together.
        """
        if spec.activation is not silu:
            raise UnsupportedModelError(
                f"{spec.name}: quantized experts support the activation silu only", hint="build with -p fp32"
            )
        gate_up, down = self._scheme(f"{spec.name}.gate_up").format, self._scheme(f"{spec.name}.down").format
        if not (gate_up.fits(spec.hidden_size) and down.fits(spec.intermediate_size)):
            return FloatExperts()(graph, x, weights, spec)
        if gate_up.block_size != down.block_size:
            raise UnsupportedModelError(f"{spec.name}: quantized experts need one block size")
        attributes: dict[str, Attribute] = {
            "k": EXPERTS_PER_TOKEN,
            "activation_type": "swiglu",
            # SiLU(gate) * up; the operator's own defaults are those of another family.
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,
            "normalize_routing_weights": 0,
            "expert_weight_bits": gate_up.bits,
            "fc2_expert_weight_bits": down.bits,
            "block_size": gate_up.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        }
        sources, shape = spec.gate_up_sources(), (2 * spec.intermediate_size, spec.hidden_size)
        codes, scales, zero_points = self._declare(graph, f"{spec.name}.gate_up", sources, shape)
        inputs = [codes, scales, NO_VALUE]
        sources, shape = spec.down_sources(), (spec.hidden_size, spec.intermediate_size)
        codes, scales, down_zero_points = self._declare(graph, f"{spec.name}.down", sources, shape)
        inputs += [codes, scales, *[NO_VALUE] * 4, zero_points, down_zero_points, NO_VALUE]
        # Experts are chosen by their weights too: those of a token are its only ones above zero.
        (y,) = graph.op("QMoE", [x, weights, *inputs, weights], domain=CONTRIB_DOMAIN, attributes=attributes)
        return y

    def _declare(
        self, graph: Graph, name: str, sources: tuple[Source, ...], shape: tuple[int, int]
    ) -> tuple[Value, Value, Value]:
        """Declare codes, scales and zero points.

        Args:
            graph: Graph under construction.
            name: Name of the matrices of all experts.
            sources: Their checkpoint tensors, one or two an expert.
            shape: (N, K) of one expert.
        """
        recipe, together = self._scheme(name), shape[0] // sources[0].shape[0]
        experts, blocks, bits = len(sources) // together, recipe.format.blocks(shape[1]), recipe.format.bits
        outputs = [
            TensorSpec(f"{name}.weight_codes", np.uint8, (experts, shape[0], shape[1] * bits // 8)),
            TensorSpec(f"{name}.weight_scales", np.float32, (experts, shape[0], blocks)),
        ]
        if not recipe.format.symmetric:
            width = -(-blocks * bits // 8)
            outputs.append(TensorSpec(f"{name}.weight_zero_points", np.uint8, (experts, shape[0], width)))

        def convert(weights: Sequence[FloatArray]) -> list[Array]:
            return _expert_arrays(map(recipe.quantize, weights), outputs)

        def repack(matrices: Sequence[QuantizedMatrix]) -> list[Array] | None:
            exact = [convert_exactly(matrix, recipe.format) for matrix in matrices]
            found = [matrix for matrix in exact if matrix is not None]
            return _expert_arrays(found, outputs) if len(found) == len(exact) else None

        codes, scales, *rest = graph.weight(Weight("experts", sources, tuple(outputs), convert, repack, recipe.format))
        return codes, scales, rest[0] if rest else NO_VALUE


class SparseMoE:
    """A router and its experts in place of an MLP.

    Args:
        name: Module path, for example ``model.layers.0.block_sparse_moe``.
        experts: The experts.
        jitter: Of the router, see :func:`sparse_mixer`.
        factory: Emits the experts.
    """

    def __init__(self, name: str, experts: ExpertsSpec, jitter: float, factory: ExpertsFactory) -> None:
        self._name, self._experts, self._jitter, self._factory = name, experts, jitter, factory

    def __call__(self, graph: Graph, x: Value) -> Value:
        """From ``x`` [B, S, hidden_size] to [B, S, hidden_size]."""
        experts = self._experts
        with graph.scope("gate"):
            # A router that is rounded sends tokens to other experts, and is small.
            spec = module_spec(
                f"{self._name}.gate", experts.hidden_size, experts.num_experts, bias=False, group="router"
            )
            scores = FloatLinear()(graph, x, spec)
            rows = graph.constant(np.array([-1, experts.num_experts], dtype=np.int64))
            (flat,) = graph.op("Reshape", [scores, rows])
            weights = sparse_mixer(graph, flat, experts.num_experts, self._jitter)
        with graph.scope("experts"):
            return self._factory(graph, x, weights, experts)


def sparse_mixer(graph: Graph, scores: Value, num_experts: int, jitter: float) -> Value:
    """Choose two experts a token as SparseMixer (arXiv 2409.12136) does when it does not train.

    Each chosen expert's weight is its share in a softmax over the experts whose scores come near its own: those with
    ``best - score <= 2 * jitter * max(|score|, best)``. The second one is the best of the others.

    Args:
        graph: Graph under construction.
        scores: [T, num_experts].
        num_experts: How many there are.
        jitter: ``router_jitter_noise``.

    Returns:
        [T, num_experts], 0 for experts that are not chosen.
    """
    zero = graph.constant(np.array(0.0, dtype=np.float32))
    width = graph.constant(np.array(2.0 * jitter, dtype=np.float32))
    last = graph.constant(np.array([1], dtype=np.int64))
    numbers = graph.constant(np.arange(num_experts, dtype=np.int64))
    count = graph.constant(np.array([EXPERTS_PER_TOKEN], dtype=np.int64))
    best, chosen = graph.op("TopK", [scores, count], attributes={"axis": -1}, count=2)  # [T, 2]
    (magnitude,) = graph.op("Abs", [scores])
    splits: Mapping[str, Attribute] = {"axis": -1, "num_outputs": EXPERTS_PER_TOKEN}
    bests = graph.op("Split", [best], attributes=splits, count=EXPERTS_PER_TOKEN)
    indices = graph.op("Split", [chosen], attributes=splits, count=EXPERTS_PER_TOKEN)
    weights, taken = zero, None
    for value, index in zip(bests, indices, strict=True):  # [T, 1] each
        (behind,) = graph.op("Sub", [value, scores])
        (larger,) = graph.op("Max", [magnitude, value])
        (bound,) = graph.op("Mul", [larger, width])
        (near,) = graph.op("LessOrEqual", [behind, bound])
        if taken is not None:
            (free,) = graph.op("Not", [taken])
            (near,) = graph.op("And", [near, free])
        (ratio,) = graph.op("Exp", [graph.op("Neg", [behind])[0]])
        (kept,) = graph.op("Where", [near, ratio, zero])
        (total,) = graph.op("ReduceSum", [kept, last])
        (weight,) = graph.op("Reciprocal", [total])
        (taken,) = graph.op("Equal", [numbers, index])  # [T, num_experts]
        (weights,) = graph.op("Where", [taken, weight, weights])
    return weights


def _expert_arrays(matrices: Iterable[QuantizedMatrix], outputs: Sequence[TensorSpec]) -> list[Array]:
    """Return codes, scales and, if asymmetric, zero points as they are declared: [num_experts, N, ...] each.

    The rows of an expert's matrices take turns. Only one matrix is in memory besides them.
    """
    arrays = [np.empty(spec.shape, dtype=spec.dtype) for spec in outputs]
    for index, matrix in enumerate(matrices):
        together = arrays[0].shape[1] // len(matrix.codes)
        expert, turn = divmod(index, together)
        for array, part in zip(arrays, quantized_arrays(matrix), strict=True):
            array[expert, turn::together] = part.reshape(len(part), -1)
    return arrays
