"""A decoder graph with an 8-bit cache, as the agent makes it: what the builder measures such a cache on."""

from __future__ import annotations

from typing import Final

import onnx

from lamplighter_agent.package.manifest import CacheScales

_OPERATOR: Final = "GroupQueryAttention"
_PAST_KEY: Final = 3
_SCALES: Final = 12
"""Inputs of the operator: the cached keys, and the first of the two scales."""

_ATTRIBUTES: Final = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def keep_codes(model: onnx.ModelProto, scales: CacheScales) -> None:
    """Let a graph with a float32 cache keep keys and values as int8 codes.

    Args:
        model: The graph, which is changed.
        scales: One for each channel of each layer.
    """
    graph = model.graph
    for node in graph.node:
        if node.op_type == _OPERATOR and len(node.input) > _PAST_KEY and node.input[_PAST_KEY]:
            layer = int(node.input[_PAST_KEY].split(".")[1])
            pair = {f"kv_scale.{layer}.key": scales.key[layer], f"kv_scale.{layer}.value": scales.value[layer]}
            for name, data in pair.items():
                graph.initializer.append(
                    onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [len(data) // 4], data, raw=True)
                )
            node.input.extend([""] * (_SCALES - len(node.input)))
            node.input.extend(pair)
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in _ATTRIBUTES.items())
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
