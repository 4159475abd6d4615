"""The header of a GGUF file: metadata and the places of the tensors, every count and offset checked against the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's reader makes several array
views an element, which takes 700 MB for the vocabulary of a Gemma, and it believes any count.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, NoReturn

import gguf
import numpy as np

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.fields import Fields

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
"""``struct`` codes of the value types of a fixed size."""
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_MAX_TEXT_BYTES: Final = 64 * 1024 * 1024
_MIN_FIELD_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file, not read yet.

    Attributes:
        path: File that holds it.
        offset: First byte in the file.
        length: Bytes.
        kind: How its values are stored.
        shape: Extents, the slowest first; rows are whole blocks.
    """

    path: Path
    offset: int
    length: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header of a file says: metadata by key, tensors by their names in the file."""

    path: Path
    metadata: Fields
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: If it is no GGUF file, is cut short, or a count, size or offset cannot be.
        UnsupportedModelError: If version, byte order or a tensor's kind is unknown.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream, path.stat().st_size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def shortest_decimal(value: float) -> float:
    """Return what a ``config.json`` says for a float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Reader:
    """Reads the header front to back and never asks for more bytes than the file has left."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._left, self._size = path, stream, size, size
        self._where = "the header"

    def read(self) -> GgufFile:
        """Read counts, metadata and descriptions of the tensors, then place the tensors; see :func:`read_gguf`."""
        if self._size < len(_MAGIC) or self._bytes(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{self._path}: not a GGUF file", hint="give a file that begins with 'GGUF'")
        version = self._integer("I")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            found = "big-endian" if big_endian else f"of version {version}"
            raise UnsupportedModelError(
                f"{self._path}: the GGUF file is {found}", hint="supported are: versions 2 and 3"
            )
        tensor_count, field_count = self._integer("Q"), self._integer("Q")
        self._check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
        self._check_count(field_count, _MIN_FIELD_BYTES, "metadata fields")
        metadata = Fields(self._metadata(field_count), str(self._path))
        described = [self._describe() for _ in range(tensor_count)]
        alignment = metadata.integer("general.alignment", default=_DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{self._path}: general.alignment is {alignment}, but must be a multiple of 8")
        header_bytes = self._size - self._left
        start = header_bytes + -header_bytes % alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                raise CheckpointError(f"{self._path}: tensor {name} is there twice")
            if offset % alignment:
                raise CheckpointError(f"{self._path}: tensor {name} is at {offset}, no multiple of {alignment}")
            tensors[name] = self._place(name, shape, kind, start + offset)
        return GgufFile(self._path, metadata, tensors)

    def _metadata(self, count: int) -> dict[str, object]:
        found: dict[str, object] = {}
        for _ in range(count):
            self._where = "the metadata"
            key = self._text()
            if key in found:
                raise CheckpointError(f"{self._path}: the metadata field {key} is there twice")
            self._where = f"the metadata field {key}"
            kind = self._integer("I")
            found[key] = self._array() if kind == _ARRAY else self._value(kind)
        return found

    def _describe(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, kind and offset of a tensor."""
        self._where = "the list of tensors"
        name = self._text()
        self._where = f"the description of tensor {name}"
        dimensions = self._integer("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: tensor {name} has {dimensions} dimensions")
        shape = tuple(self._integer("Q") for _ in range(dimensions))
        return name, shape[::-1], self._integer("I"), self._integer("Q")

    def _place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(f"{self._path}: tensor {name} is of the unknown kind {number}") from error
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{self._path}: tensor {name} has shape {list(shape)}, but rows of {kind.name} are blocks of {block}"
            )
        length = math.prod(shape) // block * block_bytes
        if offset + length > self._size:
            raise CheckpointError(
                f"{self._path}: the file ends inside tensor {name}: it has {self._size} bytes, "
                f"but the tensor should end at {offset + length}",
                hint="download it again",
            )
        return GgufTensor(self._path, offset, length, kind, shape)

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._text()
        code = _SCALARS.get(kind)
        if code is None:
            raise CheckpointError(f"{self._path}: {self._where} is of the unknown type {kind}")
        value: float = struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]
        return shortest_decimal(value) if code == "f" else value

    def _array(self) -> list[object]:
        kind, count = self._integer("I"), self._integer("Q")
        if kind == _STRING:
            self._check_count(count, 8, f"texts in {self._where}")
            return [self._text() for _ in range(count)]
        code = _SCALARS.get(kind)
        if code is None:
            raise CheckpointError(f"{self._path}: {self._where} is an array of the unknown type {kind}")
        size = struct.calcsize("<" + code)
        self._check_count(count, size, f"values in {self._where}")
        values: list[object] = np.frombuffer(self._bytes(count * size), dtype=np.dtype(code).newbyteorder("<")).tolist()
        return values

    def _text(self) -> str:
        length = self._integer("Q")
        if length > _MAX_TEXT_BYTES:
            raise CheckpointError(f"{self._path}: a text in {self._where} should have {length} bytes")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path}: a text in {self._where} is not UTF-8") from error

    def _integer(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]
        return value

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._left:
            raise CheckpointError(
                f"{self._path}: should have {count} {what}, but only {self._left} bytes are left",
                hint="download it again",
            )

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            self._end()
        data = self._stream.read(count)
        if len(data) != count:
            self._end()
        self._left -= count
        return data

    def _end(self) -> NoReturn:
        raise CheckpointError(f"{self._path}: the file ends inside {self._where}", hint="download it again")
