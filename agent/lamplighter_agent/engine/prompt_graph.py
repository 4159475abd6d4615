"""Turns a decoder graph into one for prompts: the same weights, multiplied in float32.

The projections of a package (``MatMulNBits`` with accuracy level 4) round what they multiply to 8 bits, block by block:
the fastest way for a single token, which waits for its weights to come from memory. A prompt of many tokens waits for
the multiplications instead, and where a CPU has wide float32 units it is faster to unpack the weights once for all its
tokens and to multiply in float32 (accuracy level 1). The result is a little more exact, too. Both need the weights
packed in an order of their own.
"""

from __future__ import annotations

from typing import Final

from lamplighter_agent.engine.protobuf import edit_fields
from lamplighter_agent.engine.protobuf_nodes import (
    GRAPH_NODE,
    MODEL_GRAPH,
    number_attribute,
    read_node,
    with_attributes,
)

_OPERATOR: Final = "MatMulNBits"
_LEVEL: Final = "accuracy_level"
_FLOAT32_LEVEL: Final = 1
_INT8_LEVEL: Final = 4
_BITS: Final = "bits"
_PACKED_BITS: Final = 4
"""onnxruntime packs weights of other widths for level 4 alone; otherwise it unpacks them at every call."""


def with_float_projections(model: memoryview) -> bytes | None:
    """Return a serialized ``ModelProto`` whose 4-bit projections multiply in float32; None if it has none to change.

    Raises:
        PackageError: If the bytes are no model.
    """
    changed = 0

    def edit_node(content: memoryview) -> bytes:
        nonlocal changed
        node = read_node(content)
        numbers = node.numbers if node.operator == _OPERATOR else {}
        if numbers.get(_LEVEL) != _INT8_LEVEL or numbers.get(_BITS) != _PACKED_BITS:
            return bytes(content)
        changed += 1
        return with_attributes(content, {_LEVEL: number_attribute(_LEVEL, _FLOAT32_LEVEL)})

    edited = edit_fields(model, {MODEL_GRAPH: lambda graph: edit_fields(graph, {GRAPH_NODE: edit_node})})
    return edited if changed else None
