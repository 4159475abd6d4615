"""Rewrites of a finished graph: models emit float32 for the CPU, other targets take other types and operators.

Each function changes an ``onnx.ModelProto`` in place. Their order matters little, but types go first, so that what the
others insert is of the right type already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lamplighter_builder.graph import CONTRIB_DOMAIN

_FLOAT: Final = int(TensorProto.FLOAT)
_HALF: Final = int(TensorProto.FLOAT16)
_ROTARY_INPUTS: Final = slice(7, 9)
_POSITION_INPUT: Final = 9
_BIAS_INPUT: Final = 5
_SKIP_NORMS: Final = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def adopt_stored_types(model: ModelProto) -> None:
    """Give each external float tensor the type that its bytes have in the weights file: float32 or float16."""
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL and tensor.data_type == _FLOAT:
            length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            if length == 2 * int(np.prod(tensor.dims, dtype=np.int64)):
                tensor.data_type = _HALF


def widen_half_tensors(model: ModelProto) -> None:
    """Put a cast to float32 behind every float16 initializer, so that all arithmetic stays float32.

    onnxruntime computes the casts of whole matrices once, when it loads the model. Rows looked up from a table are cast
    after the lookup, so that no second table is made for that.
    """
    graph = model.graph
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == _HALF}
    casts: dict[str, NodeProto] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in halves:
            rows = f"{node.output[0]}.float16"
            cast = _cast(f"{node.name}/Cast", rows, node.output[0], _FLOAT)
            node.output[0] = rows
            nodes += [node, cast]
            continue
        for index, name in enumerate(node.input):
            if name in halves:
                node.input[index] = f"{name}.float32"
                casts[name] = _cast(f"/widen/{name}", name, node.input[index], _FLOAT)
        nodes.append(node)
    _replace_nodes(graph, [*casts.values(), *nodes])


def compute_in_half(model: ModelProto) -> None:
    """Make every float32 input, output, constant and cast float16. External tensors must be stored as that already."""
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == _FLOAT:
                value.type.tensor_type.elem_type = _HALF
        for tensor in graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                _narrow(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    _narrow(attribute.t)
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                    attribute.i = _HALF


def use_contrib_norms(model: ModelProto) -> None:
    """Replace ``RMSNormalization``, new in opset 23, by onnxruntime's ``SimplifiedLayerNormalization``, the same."""
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type == "RMSNormalization" and not node.domain:
                node.op_type = "SimplifiedLayerNormalization"


def drop_unused_norm_outputs(model: ModelProto) -> None:
    """Leave out mean and inverse deviation of the norms with a residual, which DirectML's kernels refuse to make."""
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type in _SKIP_NORMS:
                for index in range(1, min(3, len(node.output))):
                    node.output[index] = ""


def drop_accuracy_level(model: ModelProto) -> None:
    """Remove the hint how ``MatMulNBits`` should compute: only the CPU's kernels read it."""
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                _remove_attribute(node, "accuracy_level")


def split_matmul_biases(model: ModelProto) -> None:
    """Add the bias of a ``MatMulNBits`` in a node of its own: the kernels for CUDA and DirectML take none."""
    for graph in _graphs(model.graph):
        nodes = []
        for node in graph.node:
            nodes.append(node)
            if node.op_type == "MatMulNBits" and len(node.input) > _BIAS_INPUT and node.input[_BIAS_INPUT]:
                output = node.output[0]
                product = f"{output}.product"
                nodes.append(
                    helper.make_node("Add", [product, node.input[_BIAS_INPUT]], [output], name=f"{node.name}/Add")
                )
                node.output[0] = product
                node.input.pop()
                _trim_inputs(node)
        _replace_nodes(graph, nodes)


def unpack_attention(model: ModelProto, *, head_dim: int, rotary_dim: int) -> None:
    """Split packed projections and rotate outside ``GroupQueryAttention``.

    DirectML's kernel does neither, and no kernel rotates every number of features.

    ::

        qkv ─ Split ─┬─ RotaryEmbedding ─ query
                     ├─ RotaryEmbedding ─ key
                     └─ value

    Positions are those that the attention was given, or ``position_ids`` int64 [B, S], which then becomes an input of
    the graph.

    Args:
        model: The model.
        head_dim: Features of a head.
        rotary_dim: Leading features of a head that are rotated.
    """
    graph = model.graph
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            if not node.input[1]:
                nodes.append(_split_heads(graph, node, head_dim))
            if _integer(node, "do_rotary"):
                nodes += _rotate_outside(node, head_dim=head_dim, rotary_dim=rotary_dim)
        nodes.append(node)
    _replace_nodes(graph, nodes)
    rotates = any("position_ids" in node.input for node in nodes)
    if rotates and "position_ids" not in {value.name for value in graph.input}:
        shape = ["batch_size", "sequence_length"]
        graph.input.insert(2, helper.make_tensor_value_info("position_ids", TensorProto.INT64, shape))


def set_versions(model: ModelProto, *, opset: int, ir_version: int) -> None:
    """Set the opset of ONNX's own operators and the version of the file format."""
    model.ir_version = ir_version
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = opset


def _split_heads(graph: GraphProto, node: NodeProto, head_dim: int) -> NodeProto:
    keys = _integer(node, "kv_num_heads") * head_dim
    sizes = [_integer(node, "num_heads") * head_dim, keys, keys]
    name = f"split_sizes.{sizes[0]}.{keys}"
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), name))
    packed, parts = node.input[0], [f"{node.name}/{part}" for part in ("query", "key", "value")]
    for index, part in enumerate(parts):
        node.input[index] = part
    return helper.make_node("Split", [packed, name], parts, name=f"{node.name}/Split", axis=-1)


def _rotate_outside(node: NodeProto, *, head_dim: int, rotary_dim: int) -> list[NodeProto]:
    cos_sin = list(node.input[_ROTARY_INPUTS])
    given = len(node.input) > _POSITION_INPUT and node.input[_POSITION_INPUT]
    positions = node.input[_POSITION_INPUT] if given else "position_ids"
    rotations = []
    for index, (part, heads) in enumerate((("query", "num_heads"), ("key", "kv_num_heads"))):
        attributes = {"interleaved": _integer(node, "rotary_interleaved")}
        if rotary_dim != head_dim:
            attributes |= {"num_heads": _integer(node, heads), "rotary_embedding_dim": rotary_dim}
        rotated = f"{node.name}/{part}_rotated"
        rotation = helper.make_node(
            "RotaryEmbedding",
            [node.input[index], positions, *cos_sin],
            [rotated],
            name=f"{node.name}/{part}/RotaryEmbedding",
            domain=CONTRIB_DOMAIN,
        )
        rotation.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        rotations.append(rotation)
        node.input[index] = rotated
    for index in range(_ROTARY_INPUTS.start, min(_POSITION_INPUT + 1, len(node.input))):
        node.input[index] = ""
    _trim_inputs(node)
    for name in ("do_rotary", "rotary_interleaved"):
        _remove_attribute(node, name)
    return rotations


def _cast(name: str, source: str, target: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=name, to=dtype)


def _narrow(tensor: TensorProto) -> None:
    """Make an inline float32 tensor float16; a value beyond its range, such as a mask's lowest, becomes its end."""
    if tensor.data_type != _FLOAT:
        return
    limit = np.finfo(np.float16).max
    values = numpy_helper.to_array(tensor)
    finite = np.where(np.isfinite(values), values.clip(-limit, limit), values)
    tensor.CopyFrom(numpy_helper.from_array(finite.astype(np.float16), tensor.name))


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for inner in _graphs(graph):
        yield from inner.initializer


def _replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _integer(node: NodeProto, name: str) -> int:
    """Return an integer attribute, 0 if it is not there, which is each operator's default for those asked for here."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _remove_attribute(node: NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _trim_inputs(node: NodeProto) -> None:
    """Drop optional inputs that are left out at the end."""
    while node.input and not node.input[-1]:
        node.input.pop()
