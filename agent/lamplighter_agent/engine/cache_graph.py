"""Turns a decoder graph with a float32 cache of the whole context into the same graph with another cache.

One package serves all: the graph is built for float32 and whole contexts, and where the memory plan chooses otherwise
it is edited as it is loaded. For int8 the manifest has a scale for every channel; ``GroupQueryAttention`` quantizes
what it writes and reads keys and values with these scales (onnxruntime's ``docs/contrib_ops/cpu/gqa.md``). Windowed
layers with small buffers (``windows``) get ``sliding_window_cache``. A package does not have it from the start, because
the operator then refuses every buffer that is smaller than the window, as other runtimes make it for a short text.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.protobuf import edit_fields, encode_bytes, encode_number, read_fields
from lamplighter_agent.engine.protobuf_nodes import FLOAT, INT8, initializer, number_attribute, value_info
from lamplighter_agent.engine.unpacked_prompts import INPUTS, PromptGraph, newer_opset
from lamplighter_agent.errors import IncompatiblePackageError
from lamplighter_agent.package.manifest import CacheScales, ModelFacts

ScaleArray = NDArray[np.float32]

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_MODEL_OPSET_IMPORT: Final = 8
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_GRAPH_INPUT: Final = 11
_GRAPH_OUTPUT: Final = 12
_NODE_INPUT: Final = 1
_NODE_OP_TYPE: Final = 4
_NODE_ATTRIBUTE: Final = 5
_ATTRIBUTE_NAME: Final = 1
_ATTRIBUTE_TEXT: Final = 4
_ATTRIBUTE_TYPE: Final = 20
_TYPE_TEXT: Final = 3
_VALUE_NAME: Final = 1
_VALUE_TYPE: Final = 2
_TYPE_TENSOR: Final = 1
_TENSOR_ELEMENT: Final = 1

_OPERATOR: Final = b"GroupQueryAttention"
_PAST_KEY: Final = 3
_SCALES: Final = 12
"""Inputs of the operator: the cached keys, and the first of the two scales."""

_ATTRIBUTES: Final = (b"k_quant_type", b"v_quant_type", b"kv_cache_bit_width")
_WINDOWED: Final = b"sliding_window_cache"


def cache_scales(scales: CacheScales, model: ModelFacts) -> list[tuple[ScaleArray, ScaleArray]]:
    """Return the scales of each layer's keys and values, float32 [num_key_value_heads, head_dim]."""
    shape = (model.num_key_value_heads, model.head_dim)
    return [
        (np.frombuffer(key, dtype="<f4").reshape(shape), np.frombuffer(value, dtype="<f4").reshape(shape))
        for key, value in zip(scales.key, scales.value, strict=True)
    ]


def with_cache(
    model: memoryview,
    layers: int,
    *,
    scales: list[tuple[ScaleArray, ScaleArray]] | None = None,
    windowed: tuple[int, ...] = (),
    prompts: PromptGraph | None = None,
) -> bytes:
    """Return a serialized ``ModelProto`` whose cache is another one.

    Args:
        model: The model with a float32 cache of the whole context.
        layers: Number of decoder layers.
        scales: Scales of each layer's keys and values, float32 [heads, head_dim], for int8; None for float32.
        windowed: Layers whose buffers are smaller than the context.
        prompts: Computes prompts from unpacked keys and values, with ``scales``; None: as decode steps do.

    Raises:
        PackageError: If the bytes are no model.
        IncompatiblePackageError: If the graph keeps its cache otherwise than ``GroupQueryAttention`` does.
    """
    found: list[int] = []

    def edit_node(node: memoryview) -> bytes:
        layer = _cache_layer(node)
        if layer is None:
            return bytes(node)
        found.append(layer)
        edited = bytes(node) if scales is None else _quantized(node, layer)
        if prompts is not None:
            edited = prompts.choice(node, edited, layer)
        return _with_window(edited) if layer in windowed else edited

    def edit_graph(graph: memoryview) -> bytes:
        if scales is None:
            return edit_fields(graph, {_GRAPH_NODE: edit_node})
        edits = {_GRAPH_NODE: edit_node, _GRAPH_INPUT: _edit_value, _GRAPH_OUTPUT: _edit_value}
        added = [
            encode_bytes(
                _GRAPH_INITIALIZER,
                initializer(_scale_name(layer, kind).decode(), FLOAT, [scale.size], scale.astype("<f4").tobytes()),
            )
            for layer, pair in enumerate(scales)
            for kind, scale in zip(("key", "value"), pair, strict=True)
        ]
        if prompts is not None:
            added += [encode_bytes(_GRAPH_INITIALIZER, constant) for constant in prompts.initializers(scales)]
            added += [encode_bytes(_GRAPH_INPUT, value_info(*given)) for given in INPUTS.items()]
        return edit_fields(graph, edits) + b"".join(added)

    edited = edit_fields(
        model, {_MODEL_GRAPH: edit_graph} | ({} if prompts is None else {_MODEL_OPSET_IMPORT: newer_opset})
    )
    if sorted(found) != list(range(layers)):
        raise IncompatiblePackageError(
            f"the graph has {len(found)} attention layers with a cache of their own, but the manifest has {layers}",
            hint="build the package anew",
        )
    return edited


def _with_window(node: bytes) -> bytes:
    kept = [
        bytes(field.raw)
        for field in read_fields(memoryview(node))
        if field.number != _NODE_ATTRIBUTE or _name(field.content) != _WINDOWED
    ]
    return b"".join([*kept, number_attribute(_WINDOWED.decode(), 1)])


def _cache_layer(node: memoryview) -> int | None:
    """Return the layer whose cache a node keeps, or None."""
    inputs, operator = [], b""
    for field in read_fields(node):
        if field.number == _NODE_INPUT and field.content is not None:
            inputs.append(bytes(field.content))
        elif field.number == _NODE_OP_TYPE and field.content is not None:
            operator = bytes(field.content)
    if operator != _OPERATOR or len(inputs) <= _PAST_KEY:
        return None
    prefix, _, rest = inputs[_PAST_KEY].partition(b".")
    number = rest.removesuffix(b".key")
    return int(number) if prefix == b"past_key_values" and number.isdigit() else None


def _quantized(node: memoryview, layer: int) -> bytes:
    inputs, others = [], []
    for field in read_fields(node):
        if field.number == _NODE_INPUT and field.content is not None:
            inputs.append(bytes(field.content))
        elif field.number != _NODE_ATTRIBUTE or _name(field.content) not in _ATTRIBUTES:
            others.append(bytes(field.raw))
    inputs += [b""] * (_SCALES + 2 - len(inputs))
    inputs[_SCALES : _SCALES + 2] = [_scale_name(layer, "key"), _scale_name(layer, "value")]
    attributes = [_text_attribute(name, b"PER_CHANNEL") for name in _ATTRIBUTES[:2]]
    attributes.append(number_attribute(_ATTRIBUTES[2].decode(), 8))
    return b"".join([*(encode_bytes(_NODE_INPUT, name) for name in inputs), *others, *attributes])


def _edit_value(value: memoryview) -> bytes:
    """Return a graph input or output, int8 if it is a part of the cache."""
    if not (_name(value) or b"").startswith((b"past_key_values.", b"present.")):
        return bytes(value)

    def edit_tensor(tensor: memoryview) -> bytes:
        kept = b"".join(bytes(field.raw) for field in read_fields(tensor) if field.number != _TENSOR_ELEMENT)
        return encode_number(_TENSOR_ELEMENT, INT8) + kept

    return edit_fields(value, {_VALUE_TYPE: lambda kind: edit_fields(kind, {_TYPE_TENSOR: edit_tensor})})


def _name(message: memoryview | None) -> bytes | None:
    """Return the first field, which is the name in values and attributes alike."""
    for field in read_fields(memoryview(b"") if message is None else message):
        if field.number == _VALUE_NAME and field.content is not None:
            return bytes(field.content)
    return None


def _scale_name(layer: int, kind: str) -> bytes:
    return f"kv_scale.{layer}.{kind}".encode()


def _text_attribute(name: bytes, text: bytes) -> bytes:
    content = encode_bytes(_ATTRIBUTE_NAME, name) + encode_bytes(_ATTRIBUTE_TEXT, text)
    return encode_bytes(_NODE_ATTRIBUTE, content + encode_number(_ATTRIBUTE_TYPE, _TYPE_TEXT))
