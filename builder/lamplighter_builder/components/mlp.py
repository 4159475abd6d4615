"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.components.linear import (
    LinearFactory,
    LinearSpec,
    bias_source,
    linear_source,
    module_spec,
)
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import CONTRIB_DOMAIN, Graph, Value

Activation = Callable[[Graph, Value], Value]
"""Emits an element-wise function."""


def silu(graph: Graph, x: Value) -> Value:
    """``x * sigmoid(x)`` as one node."""
    (y,) = graph.op("QuickGelu", [x], domain=CONTRIB_DOMAIN, attributes={"alpha": 1.0})
    return y


def gelu(graph: Graph, x: Value) -> Value:
    """``x * Phi(x)`` with the normal distribution's Phi."""
    (y,) = graph.op("Gelu", [x])
    return y


def gelu_tanh(graph: Graph, x: Value) -> Value:
    """``gelu`` with Phi approximated by a tanh."""
    (y,) = graph.op("FastGelu", [x], domain=CONTRIB_DOMAIN)
    return y


def quick_gelu(graph: Graph, x: Value) -> Value:
    """``x * sigmoid(1.702 * x)``."""
    (y,) = graph.op("QuickGelu", [x], domain=CONTRIB_DOMAIN, attributes={"alpha": 1.702})
    return y


def relu(graph: Graph, x: Value) -> Value:
    """``max(x, 0)``."""
    (y,) = graph.op("Relu", [x])
    return y


_ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "silu": silu,
        "swish": silu,
        "gelu": gelu,
        "gelu_new": gelu_tanh,
        "gelu_fast": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "relu": relu,
    }
)


def read_activation(config: Fields, key: str = "hidden_act", *, gelu: str = "gelu") -> Activation:
    """Read an activation by Hugging Face's name.

    Args:
        config: Fields of ``config.json``.
        key: The field.
        gelu: What the family means by ``gelu``.

    Raises:
        CheckpointError: If the field is missing or no text.
        UnsupportedModelError: If it is not supported.
    """
    name = config.text(key)
    found = _ACTIVATIONS.get(gelu if name == "gelu" else name)
    if found is None:
        raise UnsupportedModelError(
            f"{config.origin}: {key}: activation {name!r} is not supported",
            hint=f"supported are: {', '.join(sorted(_ACTIVATIONS))}",
        )
    return found


class MLP(Protocol):
    """A feed-forward block."""

    def __call__(self, graph: Graph, x: Value) -> Value:
        """From ``x`` [B, S, hidden_size] to [B, S, hidden_size]."""


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
        self.name, self.linear, self._activation, self.bias = name, linear, activation, bias
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size

    def __call__(self, graph: Graph, x: Value) -> Value:
        """From ``x`` [B, S, hidden_size] to [B, S, hidden_size]."""
        with graph.scope("gate_up_proj"):
            gate_up = self.linear(graph, x, self.gate_up_spec())
        gate, up = graph.op("Split", [gate_up], attributes={"axis": -1, "num_outputs": 2}, count=2)
        (product,) = graph.op("Mul", [self._activation(graph, gate), up])
        with graph.scope("down_proj"):
            return self.linear(graph, product, self._down_spec())

    def gate_up_spec(self) -> LinearSpec:
        """Return the packed projection of gate and up."""
        modules = (f"{self.name}.gate_proj", f"{self.name}.up_proj")
        size = self.intermediate_size
        return LinearSpec(
            f"{self.name}.gate_up_proj",
            tuple(linear_source(module, size, self.hidden_size) for module in modules),
            self.hidden_size,
            2 * size,
            tuple(bias_source(module, size) for module in modules) if self.bias else (),
        )

    def _down_spec(self) -> LinearSpec:
        return module_spec(f"{self.name}.down_proj", self.intermediate_size, self.hidden_size, bias=self.bias)


class FusedGatedMLP(GatedMLP):
    """A gated MLP whose checkpoint holds gate and up as one tensor ``gate_up_proj``."""

    def gate_up_spec(self) -> LinearSpec:
        """Return the packed projection of gate and up."""
        return module_spec(f"{self.name}.gate_up_proj", self.hidden_size, 2 * self.intermediate_size, bias=self.bias)


class PlainMLP:
    """``fc2(activation(fc1(x)))`` with biases.

    Args:
        name: Module path, for example ``model.layers.0.mlp``.
        hidden_size: In and out features.
        intermediate_size: Features between.
        activation: Function between the two.
        linear: Makes the projections.
    """

    def __init__(
        self, name: str, hidden_size: int, intermediate_size: int, activation: Activation, linear: LinearFactory
    ) -> None:
        self._name, self._linear, self._activation = name, linear, activation
        self._hidden_size, self._intermediate_size = hidden_size, intermediate_size

    def __call__(self, graph: Graph, x: Value) -> Value:
        """From ``x`` [B, S, hidden_size] to [B, S, hidden_size]."""
        first = module_spec(f"{self._name}.fc1", self._hidden_size, self._intermediate_size, bias=True)
        second = module_spec(f"{self._name}.fc2", self._intermediate_size, self._hidden_size, bias=True)
        with graph.scope("fc1"):
            inner = self._activation(graph, self._linear(graph, x, first))
        with graph.scope("fc2"):
            return self._linear(graph, inner, second)
