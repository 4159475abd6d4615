"""Root-mean-square norms that take in the residual addition before them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lamplighter_builder.graph import CONTRIB_DOMAIN, Graph, Source, TensorSpec, Value, Weight


class Stream(NamedTuple):
    """The residual stream [B, S, hidden_size] and a block's output that is still to be added to it.

    The addition waits for the next norm, because one node does both.
    """

    residual: Value
    delta: Value | None = None


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
        weight = self._weight(graph)
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

    def _weight(self, graph: Graph) -> Value:
        spec = TensorSpec(f"{self._name}.weight", np.float32, (self._size,))
        source = Source(spec.name, spec.shape)
        (weight,) = graph.weight(Weight("norm", (source,), (spec,), lambda sources: [sources[0]]))
        return weight
