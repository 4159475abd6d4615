"""Norms over the last axis. Those of the hidden states take in the residual addition before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from lamplighter_builder.graph import CONTRIB_DOMAIN, FloatArray, Graph, Source, TensorSpec, Value, Weight


class Stream(NamedTuple):
    """The residual stream [B, S, hidden_size] and a block's output that is still to be added to it.

    The addition waits for the next norm, because one node does both.
    """

    residual: Value
    delta: Value | None = None


class Norm(Protocol):
    """A norm with its weights."""

    def __call__(self, graph: Graph, stream: Stream) -> tuple[Value, Value]:
        """Return the normed stream and the stream itself with its pending addition done, both [B, S, size]."""


class RMSNorm:
    """``x / sqrt(mean(x * x) + epsilon) * weight`` over the last axis.

    Args:
        name: Module path; the checkpoint tensor is ``{name}.weight``.
        size: Features.
        epsilon: Added to the mean.
    """

    def __init__(self, name: str, size: int, epsilon: float) -> None:
        self._name, self._size, self._epsilon = name, size, epsilon

    def __call__(self, graph: Graph, stream: Stream) -> tuple[Value, Value]:
        """Return the normed stream and the stream itself with its pending addition done, both [B, S, size]."""
        weight = declare_vector(graph, f"{self._name}.weight", self._size, self.stored_to_factor)
        if stream.delta is None:
            (normed,) = graph.op(
                "RMSNormalization", [stream.residual, weight], attributes={"epsilon": self._epsilon, "axis": -1}
            )
            return normed, stream.residual
        normed, _mean, _inv_std, residual = graph.op(
            "SkipSimplifiedLayerNormalization",
            [stream.delta, stream.residual, weight],
            domain=CONTRIB_DOMAIN,
            attributes={"epsilon": self._epsilon},
            count=4,
        )
        return normed, residual

    @staticmethod
    def stored_to_factor(stored: FloatArray) -> FloatArray:
        """From the checkpoint's tensor to the factor of each feature."""
        return stored


class OffsetRMSNorm(RMSNorm):
    """An RMS norm whose checkpoint stores the difference of each factor to one."""

    @staticmethod
    def stored_to_factor(stored: FloatArray) -> FloatArray:
        """From the checkpoint's tensor to the factor of each feature."""
        return stored + np.float32(1.0)


class LayerNorm:
    """``(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias`` over the last axis.

    Args:
        name: Module path; the checkpoint tensors are ``{name}.weight`` and ``{name}.bias``.
        size: Features.
        epsilon: Added to the variance.
    """

    def __init__(self, name: str, size: int, epsilon: float) -> None:
        self._name, self._size, self._epsilon = name, size, epsilon

    def __call__(self, graph: Graph, stream: Stream) -> tuple[Value, Value]:
        """Return the normed stream and the stream itself with its pending addition done, both [B, S, size]."""
        weight, bias = (
            declare_vector(graph, f"{self._name}.{kind}", self._size, RMSNorm.stored_to_factor)
            for kind in ("weight", "bias")
        )
        if stream.delta is None:
            (normed,) = graph.op(
                "LayerNormalization",
                [stream.residual, weight, bias],
                attributes={"epsilon": self._epsilon, "axis": -1},
            )
            return normed, stream.residual
        normed, _mean, _inv_std, residual = graph.op(
            "SkipLayerNormalization",
            [stream.delta, stream.residual, weight, bias],
            domain=CONTRIB_DOMAIN,
            attributes={"epsilon": self._epsilon},
            count=4,
        )
        return normed, residual


def declare_vector(graph: Graph, name: str, size: int, convert: Callable[[FloatArray], FloatArray]) -> Value:
    """Declare a norm's vector [size], made by ``convert`` from the checkpoint tensor of the same name."""
    spec = TensorSpec(name, np.float32, (size,))
    source = Source(name, spec.shape)
    (vector,) = graph.weight(Weight("norm", (source,), (spec,), lambda sources: [convert(sources[0])]))
    return vector
