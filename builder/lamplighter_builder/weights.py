"""The weights of a graph: compared with the checkpoint's tensors, then read, converted and written one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from lamplighter_agent.errors import BuildError, CheckpointError, WeightMismatchError
from lamplighter_builder.checkpoint import Checkpoint, WeightSource
from lamplighter_builder.graph import Array, FloatArray, Graph, Region, Weight
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.targets import GraphTarget
from lamplighter_builder.weight_file import WeightFile


def check_weights(graph: Graph, checkpoint: Checkpoint, *, tied: bool) -> None:
    """Compare the tensors that the graph needs with those of the checkpoint, both ways, by name and shape.

    Args:
        graph: Graph with declared weights.
        checkpoint: Where they are read from.
        tied: True if the head is the embedding; a stored head is then a copy and not used.

    Raises:
        WeightMismatchError: If tensors are missing or unused.
        CheckpointError: If a tensor has another shape.
    """
    needed = {source.name: source.shape for weight in graph.weights for source in weight.sources}
    unused = set(checkpoint.tensors) - set(needed) - ({"lm_head.weight"} if tied else set())
    unused = {name for name in unused if not name.endswith(".rotary_emb.inv_freq")}
    missing = set(needed) - set(checkpoint.tensors)
    if missing or unused:
        parts = [
            f"{word}: {', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("not used", unused))
            if names
        ]
        raise WeightMismatchError(
            f"{checkpoint.path}: the tensors are not those of the architecture; {'; '.join(parts)}",
            missing=tuple(sorted(missing)),
            unused=tuple(sorted(unused)),
            hint=_mismatch_hint(checkpoint, missing),
        )
    for name, shape in needed.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(found)}, but must be {list(shape)}"
            )


def _mismatch_hint(checkpoint: Checkpoint, missing: set[str]) -> str | None:
    quantization = checkpoint.config.values.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "by an unnamed method")
        return (
            f"config.json says that the weights are quantized ({method}), which cannot be read: take the model as it "
            "was before, or a GGUF file of it"
        )
    if missing == {"lm_head.weight"}:
        return "if the head is the embedding, config.json must say so with tie_word_embeddings true"
    return None


def write_weights(
    graph: Graph, checkpoint: WeightSource, target: GraphTarget, path: Path, progress: Progress
) -> dict[str, Region]:
    """Write the weights, holding one at a time, and return where each lies.

    Raises:
        BuildError: If a value is beyond the range of its stored type.
        CheckpointError: If a tensor cannot be read or holds values that are not finite.
        OSError: If the disk is full or fails.
    """
    progress.stage("weights", sum(_elements(weight) for weight in graph.weights))
    regions: dict[str, Region] = {}
    with WeightFile(path) as file:
        for weight in graph.weights:
            for spec, array in zip(weight.outputs, _make_arrays(weight, checkpoint), strict=True):
                if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
                    raise BuildError(f"{spec.name}: made {array.dtype}{array.shape}, declared {spec}")
                regions[spec.name] = file.append(target.store(array, target.stored(weight, spec)))
            progress.advance(_elements(weight))
    return regions


def _make_arrays(weight: Weight, checkpoint: WeightSource) -> Sequence[Array]:
    """Run a weight's recipe: stored codes as they are where they fit, float32 values otherwise."""
    if weight.repack is not None:
        stored = [
            matrix for source in weight.sources if (matrix := _stored_matrix(checkpoint, source.name)) is not None
        ]
        arrays = weight.repack(stored) if len(stored) == len(weight.sources) else None
        if arrays is not None:
            return arrays
    return weight.convert(_Sources(weight, checkpoint))


class _Sources(Sequence[FloatArray]):
    """A weight's sources, read as they are asked for: what a recipe takes one by one is never held together."""

    def __init__(self, weight: Weight, checkpoint: WeightSource) -> None:
        self._names = [source.name for source in weight.sources]
        self._checkpoint = checkpoint

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> FloatArray: ...

    @overload
    def __getitem__(self, index: slice) -> list[FloatArray]: ...

    def __getitem__(self, index: int | slice) -> FloatArray | list[FloatArray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _read_finite(self._checkpoint, self._names[index])


def _stored_matrix(checkpoint: WeightSource, name: str) -> QuantizedMatrix | None:
    matrix = checkpoint.quantized(name)
    if matrix is not None:
        _check_finite(matrix.scales, checkpoint, name)
    return matrix


def _read_finite(checkpoint: WeightSource, name: str) -> FloatArray:
    values = checkpoint.read(name)
    _check_finite(values, checkpoint, name)
    return values


def _check_finite(values: FloatArray, checkpoint: WeightSource, name: str) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{checkpoint.path}: tensor {name} holds NaN or infinite values")


def _elements(weight: Weight) -> int:
    return sum(int(np.prod(source.shape, dtype=np.int64)) for source in weight.sources)
