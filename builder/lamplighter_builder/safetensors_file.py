"""Safetensors files: headers checked against the file, tensors read one at a time and never mapped into memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.graph import FloatArray

_DTYPES: Final[Mapping[str, npt.DTypeLike]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
_COMPARED_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint, not read yet.

    Attributes:
        shape: Dimensions in Hugging Face's order.
        dtype: The file format's name of the stored type.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its bytes lie."""

    path: Path
    offset: int
    length: int
    info: TensorInfo


def read_tensor(name: str, stored: StoredTensor) -> FloatArray:
    """Read one tensor as float32.

    Raises:
        CheckpointError: If the file ends early or the stored type is no float.
    """
    dtype = _DTYPES.get(stored.info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{stored.path}: tensor {name} is stored as {stored.info.dtype}",
            hint=f"supported are: {', '.join(_DTYPES)}",
        )
    count = stored.length // np.dtype(dtype).itemsize
    try:
        values = np.fromfile(stored.path, dtype=dtype, count=count, offset=stored.offset)
    except OSError as error:
        raise CheckpointError(f"{stored.path}: cannot read tensor {name}: {error.strerror}") from error
    if values.size != count:
        raise CheckpointError(f"{stored.path}: the file ends inside tensor {name}", hint="download it again")
    return values.astype(np.float32, copy=False).reshape(stored.info.shape)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Tell whether two tensors are stored alike, comparing a few MiB at a time.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    if one.length != other.length:
        return False
    try:
        with one.path.open("rb") as first, other.path.open("rb") as second:
            first.seek(one.offset)
            second.seek(other.offset)
            for start in range(0, one.length, _COMPARED_BYTES):
                count = min(_COMPARED_BYTES, one.length - start)
                if first.read(count) != second.read(count):
                    return False
    except OSError as error:
        raise CheckpointError(f"{one.path}: cannot be read: {error.strerror}") from error
    return True


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Read names, shapes and places of a safetensors file and check that the file holds them all.

    Raises:
        CheckpointError: If the header is damaged or the file is shorter than the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                told = f"its header alone should have {length}" if size >= 8 else "a safetensors file begins with 8"
                raise CheckpointError(f"{path}: {size} bytes, but {told}", hint="download it again")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = msgspec.json.decode(raw, type=dict[str, dict[str, object]])
        header.pop("__metadata__", None)
        entries = {name: msgspec.convert(entry, _Entry) for name, entry in header.items()}
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    return {name: _place(path, name, entry, 8 + length, size) for name, entry in entries.items()}


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _place(path: Path, name: str, entry: _Entry, start: int, size: int) -> StoredTensor:
    begin, end = entry.data_offsets
    if not 0 <= begin <= end or any(extent < 0 for extent in entry.shape):
        raise CheckpointError(f"{path}: tensor {name} has impossible offsets or extents")
    if start + end > size:
        raise CheckpointError(
            f"{path}: {size} bytes, but tensor {name} should end at {start + end}", hint="download it again"
        )
    dtype = _DTYPES.get(entry.dtype)
    expected = None if dtype is None else math.prod(entry.shape) * np.dtype(dtype).itemsize
    if expected is not None and expected != end - begin:
        raise CheckpointError(f"{path}: tensor {name} of shape {entry.shape} has {end - begin} bytes, not {expected}")
    return StoredTensor(path, start + begin, end - begin, TensorInfo(entry.shape, entry.dtype))
