"""Reads and writes the nodes of ONNX graphs, with ``protobuf``: enough to put others in the place of one."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from lamplighter_agent.engine.protobuf import encode_bytes, encode_number, read_fields

# Field numbers of onnx.proto.
MODEL_GRAPH: Final = 7
MODEL_OPSET_IMPORT: Final = 8
GRAPH_NODE: Final = 1
GRAPH_INITIALIZER: Final = 5
GRAPH_INPUT: Final = 11
GRAPH_OUTPUT: Final = 12
NODE_INPUT: Final = 1
NODE_OUTPUT: Final = 2
OPSET_DOMAIN: Final = 1
OPSET_VERSION: Final = 2
INITIALIZER_DIMS: Final = 1
INITIALIZER_NAME: Final = 8
VALUE_NAME: Final = 1
VALUE_TYPE: Final = 2
TYPE_TENSOR: Final = 1
TENSOR_ELEMENT: Final = 1
_NODE_OP_TYPE: Final = 4
_NODE_ATTRIBUTE: Final = 5
_NODE_DOMAIN: Final = 7
_ATTRIBUTE_NAME: Final = 1
_ATTRIBUTE_FLOAT: Final = 2
_ATTRIBUTE_INT: Final = 3
_ATTRIBUTE_TEXT: Final = 4
_ATTRIBUTE_GRAPH: Final = 6
_ATTRIBUTE_INTS: Final = 8
_ATTRIBUTE_TYPE: Final = 20
_GRAPH_NAME: Final = 2
_INITIALIZER_TYPE: Final = 2
_INITIALIZER_DATA: Final = 9

FLOAT: Final = 1
INT8: Final = 3
INT64: Final = 7
BOOL: Final = 9
"""Element types."""

_KIND_INT: Final = 2
_KIND_TEXT: Final = 3
_KIND_GRAPH: Final = 5
_KIND_INTS: Final = 7
"""Types of attributes."""

ATTENTION: Final = "GroupQueryAttention"
"""The operator that keeps a cache."""


class Node(NamedTuple):
    """A node as it was read.

    Attributes:
        operator: Its ``op_type``.
        inputs: Names, empty where an input is left out.
        outputs: Names.
        attributes: The whole fields as they are on the wire, by name.
        numbers: Those of them that are integers.
        reals: Those of them that are floating-point numbers.
    """

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, bytes]
    numbers: dict[str, int]
    reals: dict[str, float]


def read_node(content: memoryview) -> Node:
    """Return what a serialized ``NodeProto`` says.

    Raises:
        PackageError: If the bytes are no message.
    """
    node = Node("", [], [], {}, {}, {})
    for field in read_fields(content):
        if field.content is None:
            continue
        if field.number == NODE_INPUT:
            node.inputs.append(_text(field.content))
        elif field.number == NODE_OUTPUT:
            node.outputs.append(_text(field.content))
        elif field.number == _NODE_OP_TYPE:
            node = node._replace(operator=_text(field.content))
        elif field.number == _NODE_ATTRIBUTE:
            _read_attribute(field.content, bytes(field.raw), node)
    return node


def read_attention(content: memoryview) -> Node | None:
    """Return a serialized ``NodeProto`` if it is a ``GroupQueryAttention``, else None.

    Raises:
        PackageError: If the bytes are no message.
    """
    # Most nodes of a graph are others, and reading one takes much longer than this search.
    if ATTENTION.encode() not in bytes(content):
        return None
    node = read_node(content)
    return node if node.operator == ATTENTION else None


def _read_attribute(content: memoryview, raw: bytes, node: Node) -> None:
    name, number, real = "", None, None
    for field in read_fields(content):
        if field.number == _ATTRIBUTE_NAME and field.content is not None:
            name = _text(field.content)
        elif field.number == _ATTRIBUTE_INT and field.value is not None:
            number = field.value - (1 << 64) if field.value >> 63 else field.value
        elif field.number == _ATTRIBUTE_FLOAT and field.content is None and field.value is None:
            (real,) = struct.unpack("<f", field.raw[-4:])
    node.attributes[name] = raw
    if number is not None:
        node.numbers[name] = number
    if real is not None:
        node.reals[name] = real


def encode_node(
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[bytes] = (),
    *,
    domain: str = "",
) -> bytes:
    """Return a serialized ``NodeProto``; ``attributes`` are whole fields."""
    parts = [encode_bytes(NODE_INPUT, name.encode()) for name in inputs]
    parts += [encode_bytes(NODE_OUTPUT, name.encode()) for name in outputs]
    parts += [encode_bytes(_NODE_OP_TYPE, operator.encode()), *attributes]
    return b"".join([*parts, encode_bytes(_NODE_DOMAIN, domain.encode())])


def with_attributes(node: memoryview, attributes: Mapping[str, bytes]) -> bytes:
    """Return a serialized ``NodeProto`` with these attributes, whole fields by name; all else stays as it is."""
    kept = [
        bytes(field.raw)
        for field in read_fields(node)
        if field.content is None or field.number != _NODE_ATTRIBUTE or name_of(field.content) not in attributes
    ]
    return b"".join([*kept, *attributes.values()])


def name_of(message: memoryview) -> str:
    """Return the name of an attribute, or of a graph's input or output: the first field of each."""
    for field in read_fields(message):
        if field.number == VALUE_NAME and field.content is not None:
            return _text(field.content)
    return ""


def number_attribute(name: str, number: int) -> bytes:
    """Return an attribute that is a non-negative integer."""
    return _attribute(name, encode_number(_ATTRIBUTE_INT, number), _KIND_INT)


def numbers_attribute(name: str, numbers: Sequence[int]) -> bytes:
    """Return an attribute that is a list of non-negative integers."""
    return _attribute(name, b"".join(encode_number(_ATTRIBUTE_INTS, number) for number in numbers), _KIND_INTS)


def text_attribute(name: str, text: str) -> bytes:
    """Return an attribute that is a text."""
    return _attribute(name, encode_bytes(_ATTRIBUTE_TEXT, text.encode()), _KIND_TEXT)


def graph_attribute(name: str, nodes: Sequence[bytes], outputs: Sequence[tuple[str, int]]) -> bytes:
    """Return an attribute that is a graph without inputs, as ``If`` has them; outputs are names and element types."""
    parts = [encode_bytes(GRAPH_NODE, node) for node in nodes]
    parts.append(encode_bytes(_GRAPH_NAME, outputs[0][0].encode()))
    parts += [encode_bytes(GRAPH_OUTPUT, value_info(*output)) for output in outputs]
    return _attribute(name, encode_bytes(_ATTRIBUTE_GRAPH, b"".join(parts)), _KIND_GRAPH)


def value_info(name: str, element: int) -> bytes:
    """Return a serialized ``ValueInfoProto`` of any shape."""
    tensor = encode_bytes(TYPE_TENSOR, encode_number(TENSOR_ELEMENT, element))
    return encode_bytes(VALUE_NAME, name.encode()) + encode_bytes(VALUE_TYPE, tensor)


def initializer(name: str, element: int, dims: Sequence[int], data: bytes) -> bytes:
    """Return a serialized ``TensorProto`` with little-endian ``data``."""
    return (
        b"".join(encode_number(INITIALIZER_DIMS, dim) for dim in dims)
        + encode_number(_INITIALIZER_TYPE, element)
        + encode_bytes(INITIALIZER_NAME, name.encode())
        + encode_bytes(_INITIALIZER_DATA, data)
    )


def int64_initializer(name: str, numbers: Sequence[int]) -> bytes:
    """Return a serialized ``TensorProto``, int64 [n]."""
    return initializer(name, INT64, [len(numbers)], struct.pack(f"<{len(numbers)}q", *numbers))


def _attribute(name: str, value: bytes, kind: int) -> bytes:
    content = encode_bytes(_ATTRIBUTE_NAME, name.encode()) + value + encode_number(_ATTRIBUTE_TYPE, kind)
    return encode_bytes(_NODE_ATTRIBUTE, content)


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8", "replace")
