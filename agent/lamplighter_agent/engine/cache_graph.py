"""Turns a decoder graph with a float32 cache of the whole context into the same graph with another cache.

One package serves all: the graph is built for float32 and whole contexts, and where the memory plan chooses otherwise
it is edited as it is loaded. For int8 the manifest has a scale for every channel; ``GroupQueryAttention`` quantizes
what it writes and reads keys and values with these scales (onnxruntime's ``docs/contrib_ops/cpu/gqa.md``). Windowed
layers with small buffers (``windows``) get ``sliding_window_cache``. A package does not have it from the start, because
the operator then refuses every buffer that is smaller than the window, as other runtimes make it for a short text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.protobuf import edit_fields, encode_bytes, encode_number, read_fields
from lamplighter_agent.engine.protobuf_nodes import (
    FLOAT,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    INT8,
    MODEL_GRAPH,
    MODEL_OPSET_IMPORT,
    NODE_INPUT,
    TENSOR_ELEMENT,
    TYPE_TENSOR,
    VALUE_TYPE,
    initializer,
    name_of,
    number_attribute,
    read_attention,
    read_node,
    text_attribute,
    value_info,
    with_attributes,
)
from lamplighter_agent.engine.unpacked_prompts import INPUTS, PromptGraph, newer_opset
from lamplighter_agent.errors import IncompatiblePackageError
from lamplighter_agent.package.manifest import CacheScales, ModelFacts

ScaleArray = NDArray[np.float32]

_PAST_KEY: Final = 3
_SCALES: Final = 12
"""Inputs of the operator: the cached keys, and the first of the two scales."""

_CODED: Final[Mapping[str, bytes]] = {
    "k_quant_type": text_attribute("k_quant_type", "PER_CHANNEL"),
    "v_quant_type": text_attribute("v_quant_type", "PER_CHANNEL"),
    "kv_cache_bit_width": number_attribute("kv_cache_bit_width", 8),
}
"""Attributes of the operator on 8-bit codes."""

_UNTILED: Final = ("smooth_softmax", "qk_output")
_BIAS: Final = 10
"""Attributes beside ``softcap``, and the first of two inputs, that the operator's tiled kernel does not know."""

_WINDOWED: Final = "sliding_window_cache"


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
        if layer not in windowed:
            return edited
        return with_attributes(memoryview(edited), {_WINDOWED: number_attribute(_WINDOWED, 1)})

    def edit_graph(graph: memoryview) -> bytes:
        if scales is None:
            return edit_fields(graph, {GRAPH_NODE: edit_node})
        edits = {GRAPH_NODE: edit_node, GRAPH_INPUT: _edit_value, GRAPH_OUTPUT: _edit_value}
        added = [encode_bytes(GRAPH_INITIALIZER, scale) for scale in _scale_initializers(scales)]
        if prompts is not None:
            added += [encode_bytes(GRAPH_INITIALIZER, constant) for constant in prompts.initializers(scales)]
            added += [encode_bytes(GRAPH_INPUT, value_info(*given)) for given in INPUTS.items()]
        return edit_fields(graph, edits) + b"".join(added)

    edited = edit_fields(
        model, {MODEL_GRAPH: edit_graph} | ({} if prompts is None else {MODEL_OPSET_IMPORT: newer_opset})
    )
    if sorted(found) != list(range(layers)):
        raise IncompatiblePackageError(
            f"the graph has {len(found)} attention layers with a cache of their own, but the manifest has {layers}",
            hint="build the package anew",
        )
    return edited


def writes_codes_first(model: memoryview) -> bool:
    """Return whether the operator writes the codes of all rows of a batch before it reads any, on an int8 cache.

    The tiled kernel has two phases for that; the other one, which bounded scores and sinks need, works row by row
    (``ApplyAttentionQuantizedFlash`` and ``ApplyAttentionQuantized`` in onnxruntime's ``gqa_attention_base.h``).

    Raises:
        PackageError: If the bytes are no model.
    """
    graphs = [field.content for field in read_fields(model) if field.number == MODEL_GRAPH]
    parts = [part for graph in graphs if graph is not None for part in read_fields(graph)]
    contents = [part.content for part in parts if part.number == GRAPH_NODE and part.content is not None]
    attention = [node for node in map(read_attention, contents) if node is not None]
    # A prepared copy names every attribute, also those that are off: 0 or -1.
    return not any(
        node.reals.get("softcap", 0.0) != 0.0
        or any(node.numbers.get(name, 0) > 0 for name in _UNTILED)
        or any(node.inputs[_BIAS:])
        for node in attention
    )


def _cache_layer(content: memoryview) -> int | None:
    """Return the layer whose cache a node keeps, or None."""
    node = read_attention(content)
    if node is None or len(node.inputs) <= _PAST_KEY:
        return None
    prefix, _, rest = node.inputs[_PAST_KEY].partition(".")
    number = rest.removesuffix(".key")
    return int(number) if prefix == "past_key_values" and number.isdecimal() else None


def _quantized(node: memoryview, layer: int) -> bytes:
    inputs = read_node(node).inputs
    inputs += [""] * (_SCALES + 2 - len(inputs))
    inputs[_SCALES : _SCALES + 2] = [_scale_name(layer, "key"), _scale_name(layer, "value")]
    fields = read_fields(memoryview(with_attributes(node, _CODED)))
    others = [bytes(field.raw) for field in fields if field.number != NODE_INPUT]
    return b"".join([*(encode_bytes(NODE_INPUT, name.encode()) for name in inputs), *others])


def _scale_initializers(scales: list[tuple[ScaleArray, ScaleArray]]) -> Iterator[bytes]:
    """Yield the scales that the operator reads, float32 [heads * head_dim] each."""
    for layer, pair in enumerate(scales):
        for kind, scale in zip(("key", "value"), pair, strict=True):
            yield initializer(_scale_name(layer, kind), FLOAT, [scale.size], scale.astype("<f4").tobytes())


def _edit_value(value: memoryview) -> bytes:
    """Return a graph input or output, int8 if it is a part of the cache."""
    if not name_of(value).startswith(("past_key_values.", "present.")):
        return bytes(value)

    def edit_tensor(tensor: memoryview) -> bytes:
        kept = b"".join(bytes(field.raw) for field in read_fields(tensor) if field.number != TENSOR_ELEMENT)
        return encode_number(TENSOR_ELEMENT, INT8) + kept

    return edit_fields(value, {VALUE_TYPE: lambda kind: edit_fields(kind, {TYPE_TENSOR: edit_tensor})})


def _scale_name(layer: int, kind: str) -> str:
    return f"kv_scale.{layer}.{kind}"
