"""Just enough of protobuf's wire format to read and edit single fields of an ONNX model without the onnx package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from lamplighter_agent.errors import PackageError

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_FIXED_LENGTHS: Final = {_FIXED64: 8, _FIXED32: 4}


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        number: Field number.
        content: Bytes of a length-delimited field (string, bytes, message); None for numbers.
        raw: The whole field as it is on the wire.
        value: A variable-length number, read as unsigned; None for the others.
    """

    number: int
    content: memoryview | None
    raw: memoryview
    value: int | None = None


def read_fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in order.

    Raises:
        PackageError: If a length points outside the message, or a wire type is unknown.
    """
    position = 0
    while position < len(message):
        begin = position
        tag, position = _read_varint(message, position)
        number, wire = tag >> 3, tag & 7
        content, value = None, None
        if wire == _VARINT:
            value, position = _read_varint(message, position)
        elif wire == _BYTES:
            length, position = _read_varint(message, position)
            content = message[position : position + length]
            position += length
        elif wire in _FIXED_LENGTHS:
            position += _FIXED_LENGTHS[wire]
        else:
            raise PackageError("the model file is not an ONNX model: unknown wire type")
        if position > len(message):
            raise PackageError("the model file is cut off")
        yield Field(number, content, message[begin:position], value)


def encode_bytes(number: int, content: bytes) -> bytes:
    """Return a length-delimited field."""
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(content)) + content


def encode_number(number: int, value: int) -> bytes:
    """Return a field with a non-negative number."""
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def edit_fields(message: memoryview, edits: Mapping[int, Callable[[memoryview], bytes]]) -> bytes:
    """Return a message with the content of fields passed through functions, by field number; others stay.

    Raises:
        PackageError: If the message is none.
    """
    parts = []
    for field in read_fields(message):
        edit = edits.get(field.number)
        if edit is None or field.content is None:
            parts.append(bytes(field.raw))
        else:
            parts.append(encode_bytes(field.number, edit(field.content)))
    return b"".join(parts)


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    # Nearly every number is one byte.
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise PackageError("the model file is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise PackageError("the model file is not an ONNX model: a number is too long")


def _encode_varint(value: int) -> bytes:
    if value < 0x80:
        return value.to_bytes()
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
