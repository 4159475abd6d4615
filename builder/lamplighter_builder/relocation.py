"""Moves the weights of a foreign model into a package's weights file: aligned, each stored once, none left inline."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lamplighter_agent.errors import CheckpointError, ManifestError
from lamplighter_agent.package.layout import WEIGHTS_NAME, check_name
from lamplighter_builder.graph import Region
from lamplighter_builder.progress import Progress
from lamplighter_builder.weight_file import WeightFile

_MIN_EXTERNAL_BYTES: Final = 1024
"""Smaller tensors stay in the graph, where a page each would be wasted on them."""

Place = tuple[str, int, int]
"""File name, offset and length of external bytes."""


def relocate_weights(model: ModelProto, folder: Path, target: Path, progress: Progress) -> None:
    """Copy all large weights into one new file and make the model point into it, one tensor in memory at a time.

    Args:
        model: The model; its external data lies in ``folder``.
        folder: Where the model comes from.
        target: The weights file to write.
        progress: Hears of the bytes.

    Raises:
        CheckpointError: If external data has another form, or the file is missing or too short.
        OSError: If the disk is full or fails.
    """
    tensors = [tensor for tensor in model.graph.initializer if _is_large(tensor)]
    progress.stage("weights", sum(_nbytes(tensor) for tensor in tensors))
    moved: dict[Place, Region] = {}
    with WeightFile(target) as file:
        for tensor in tensors:
            place = _place(tensor, folder)
            region = None if place is None else moved.get(place)
            if region is None:
                region = file.append(_read(tensor, folder, place))
            if place is not None:
                moved[place] = region
            _point(tensor, region)
            progress.advance(region.length)


def _is_large(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or _nbytes(tensor) >= _MIN_EXTERNAL_BYTES


def _nbytes(tensor: TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length" and entry.value.isdecimal():
            return int(entry.value)
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-elements // 2)
    return elements * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _place(tensor: TensorProto, folder: Path) -> Place | None:
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, offset = entries.get("location", ""), entries.get("offset", "0")
    try:
        check_name(name, f"location of the tensor {tensor.name}")
    except ManifestError as error:
        raise CheckpointError(f"{folder}: {error.message}", hint=error.hint) from error
    if not offset.isdecimal():
        raise CheckpointError(f"{folder}: the tensor {tensor.name} has the offset {offset[:40]!r}")
    path, start, length = folder / name, int(offset), _nbytes(tensor)
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {name}, where the tensor {tensor.name} should be")
    if start + length > path.stat().st_size:
        raise CheckpointError(f"{path}: the file ends inside the tensor {tensor.name}", hint="copy the folder again")
    return name, start, length


def _read(tensor: TensorProto, folder: Path, place: Place | None) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    if place is not None:
        name, offset, length = place
        return np.fromfile(folder / name, dtype=np.uint8, count=length, offset=offset)
    raw = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    return np.frombuffer(raw, dtype=np.uint8)


def _point(tensor: TensorProto, region: Region) -> None:
    """Replace a tensor's data by a reference to where it lies now."""
    external = TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", WEIGHTS_NAME), ("offset", region.offset), ("length", region.length)):
        external.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(external)
