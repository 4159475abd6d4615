"""Turns a decoder graph into one for prompts: the same weights, multiplied in float32.

The projections of a package (``MatMulNBits`` with accuracy level 4) round what they multiply to 8 bits, block by block:
the fastest way for a single token, which waits for its weights to come from memory. A prompt of many tokens waits for
the multiplications instead, and where a CPU has wide float32 units it is faster to unpack the weights once for all its
tokens and to multiply in float32 (accuracy level 1). The result is a little more exact, too. Both need the weights
packed in an order of their own.
"""

from __future__ import annotations

from typing import Final

from lamplighter_agent.engine.protobuf import edit_fields, encode_bytes, encode_number, read_fields

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_GRAPH_NODE: Final = 1
_NODE_OP_TYPE: Final = 4
_NODE_ATTRIBUTE: Final = 5
_ATTRIBUTE_NAME: Final = 1
_ATTRIBUTE_NUMBER: Final = 3
_ATTRIBUTE_TYPE: Final = 20
_TYPE_NUMBER: Final = 2

_OPERATOR: Final = b"MatMulNBits"
_LEVEL: Final = b"accuracy_level"
_FLOAT32_LEVEL: Final = 1
_INT8_LEVEL: Final = 4
_BITS: Final = b"bits"
_PACKED_BITS: Final = 4
"""onnxruntime packs weights of other widths for level 4 alone; otherwise it unpacks them at every call."""


def with_float_projections(model: memoryview) -> bytes | None:
    """Return a serialized ``ModelProto`` whose 4-bit projections multiply in float32; None if it has none to change.

    Raises:
        PackageError: If the bytes are no model.
    """
    changed = 0

    def edit_node(node: memoryview) -> bytes:
        nonlocal changed
        attributes = _attributes(node)
        if attributes.get(_LEVEL) != _INT8_LEVEL or attributes.get(_BITS) != _PACKED_BITS:
            return bytes(node)
        changed += 1
        kept = b"".join(
            field.raw
            for field in read_fields(node)
            if field.content is None or field.number != _NODE_ATTRIBUTE or _attribute(field.content)[0] != _LEVEL
        )
        level = (
            encode_bytes(_ATTRIBUTE_NAME, _LEVEL)
            + encode_number(_ATTRIBUTE_NUMBER, _FLOAT32_LEVEL)
            + encode_number(_ATTRIBUTE_TYPE, _TYPE_NUMBER)
        )
        return kept + encode_bytes(_NODE_ATTRIBUTE, level)

    edited = edit_fields(model, {_MODEL_GRAPH: lambda graph: edit_fields(graph, {_GRAPH_NODE: edit_node})})
    return edited if changed else None


def _attributes(node: memoryview) -> dict[bytes, int | None]:
    """Return the numbers among a projection's attributes by name; none for other operators."""
    operator, found = b"", dict[bytes, int | None]()
    for field in read_fields(node):
        if field.content is None:
            continue
        if field.number == _NODE_OP_TYPE:
            operator = bytes(field.content)
        elif field.number == _NODE_ATTRIBUTE:
            name, number = _attribute(field.content)
            found[name] = number
    return found if operator == _OPERATOR else {}


def _attribute(attribute: memoryview) -> tuple[bytes, int | None]:
    name, number = b"", None
    for field in read_fields(attribute):
        if field.number == _ATTRIBUTE_NAME and field.content is not None:
            name = bytes(field.content)
        elif field.number == _ATTRIBUTE_NUMBER:
            number = field.value
    return name, number
