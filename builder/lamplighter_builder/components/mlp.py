"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.components.linear import LinearFactory, LinearSpec, bias_source, linear_source
from lamplighter_builder.graph import CONTRIB_DOMAIN, Graph, Value

Activation = Callable[[Graph, Value], Value]
"""Emits an element-wise function."""


def silu(graph: Graph, x: Value) -> Value:
    """``x * sigmoid(x)`` as one node."""
    (y,) = graph.op("QuickGelu", [x], domain=CONTRIB_DOMAIN, attributes={"alpha": 1.0})
    return y


_ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType({"silu": silu, "swish": silu})


def find_activation(name: str) -> Activation:
    """Return the activation of Hugging Face's name.

    Raises:
        UnsupportedModelError: If it is not supported.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported", hint=f"supported are: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` with gate and up in one projection.

    ::

        x ─ gate_up_proj ─ Split ─┬─ activation ─┬─ Mul ─ down_proj ─ y
                                  └──────────────┘

    Args:
        name: Module path, for example ``model.layers.0.mlp``.
        hidden_size: In and out features.
        intermediate_size: Features between.
        activation: Function of the gate.
        linear: Makes the projections.
        bias: True if the projections have biases.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        linear: LinearFactory,
        *,
        bias: bool = False,
    ) -> None:
        self._name, self._linear, self._activation, self._bias = name, linear, activation, bias
        self._hidden_size, self._intermediate_size = hidden_size, intermediate_size

    def __call__(self, graph: Graph, x: Value) -> Value:
        """From ``x`` [B, S, hidden_size] to [B, S, hidden_size]."""
        with graph.scope("gate_up_proj"):
            gate_up = self._linear(graph, x, self._gate_up_spec())
        gate, up = graph.op("Split", [gate_up], attributes={"axis": -1, "num_outputs": 2}, count=2)
        (product,) = graph.op("Mul", [self._activation(graph, gate), up])
        with graph.scope("down_proj"):
            return self._linear(graph, product, self._down_spec())

    def _gate_up_spec(self) -> LinearSpec:
        modules = (f"{self._name}.gate_proj", f"{self._name}.up_proj")
        size = self._intermediate_size
        return LinearSpec(
            f"{self._name}.gate_up_proj",
            tuple(linear_source(module, size, self._hidden_size) for module in modules),
            self._hidden_size,
            2 * size,
            tuple(bias_source(module, size) for module in modules) if self._bias else (),
        )

    def _down_spec(self) -> LinearSpec:
        module = f"{self._name}.down_proj"
        return LinearSpec(
            module,
            (linear_source(module, self._hidden_size, self._intermediate_size),),
            self._intermediate_size,
            self._hidden_size,
            (bias_source(module, self._hidden_size),) if self._bias else (),
        )
