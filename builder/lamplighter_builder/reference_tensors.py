"""Tensors that transformers' modules hold otherwise than checkpoints do: the experts of a mixture as one array each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.graph import FloatArray

_ROUTER: Final = ".mlp.router.weight"
_GATE_UP: Final = ".mlp.experts.gate_up_proj"
_DOWN: Final = ".mlp.experts.down_proj"


def read_reference_tensor(checkpoint: Checkpoint, name: str) -> FloatArray:
    """Read a tensor by the name that transformers gives it.

    Raises:
        UnsupportedModelError: If the checkpoint has nothing that it could be made of.
        CheckpointError: If a tensor cannot be read.
    """
    if name in checkpoint.tensors:
        return checkpoint.read(name)
    for ending, parts in ((_GATE_UP, ("w1", "w3")), (_DOWN, ("w2",))):
        experts = list(_experts(checkpoint, name.removesuffix(ending))) if name.endswith(ending) else []
        if experts:
            return _stacked(checkpoint, experts, parts)
    router = f"{name.removesuffix(_ROUTER)}.block_sparse_moe.gate.weight"
    if name.endswith(_ROUTER) and router in checkpoint.tensors:
        return checkpoint.read(router)
    raise UnsupportedModelError(
        f"{checkpoint.path}: transformers looks for a tensor {name}, which the checkpoint has not",
        hint="build it without what compares it with transformers: --quantizer least-squares --no-fidelity",
    )


def _experts(checkpoint: Checkpoint, layer: str) -> Iterator[str]:
    number = 0
    while f"{layer}.block_sparse_moe.experts.{number}.w1.weight" in checkpoint.tensors:
        yield f"{layer}.block_sparse_moe.experts.{number}"
        number += 1


def _stacked(checkpoint: Checkpoint, experts: list[str], parts: tuple[str, ...]) -> FloatArray:
    """Return the parts of each expert below each other, all experts stacked: [num_experts, rows, columns]."""
    rows, columns = checkpoint.tensors[f"{experts[0]}.{parts[0]}.weight"].shape
    stacked: FloatArray = np.empty((len(experts), len(parts) * rows, columns), dtype=np.float32)
    for index, expert in enumerate(experts):
        for place, part in enumerate(parts):
            stacked[index, place * rows : (place + 1) * rows] = checkpoint.read(f"{expert}.{part}.weight")
    return stacked
