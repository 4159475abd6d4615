"""What a foreign graph tells of itself: sizes, precision of its tensors, memory. Its folder names only some of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from lamplighter_agent.package.manifest import ModelFacts, Precision, TensorGroup
from lamplighter_builder.genai_folder import GenaiFolder
from lamplighter_builder.graph import TensorSpec
from lamplighter_builder.memory import packed_bytes
from lamplighter_builder.precision import PrecisionName

_BIAS_INPUT: Final = 5
_PASSING: Final = ("Reshape", "Transpose", "Cast")
"""Operators behind which a tensor is still the same weight."""

_PRODUCTS: Final = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
_CODE_INPUTS: Final[Mapping[str, tuple[int, ...]]] = {
    "MatMulNBits": (1,),
    "GatherBlockQuantized": (0,),
    "QMoE": (2, 5, 8),
}
"""Inputs of the operators on quantized weights that are codes."""

_QUANTIZED_OPERATORS: Final = frozenset(_CODE_INPUTS)
_PRECISION_NAMES: Final[Mapping[str, PrecisionName]] = {"uint4": "int4", "uint8": "int8", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A large initializer and what it is for.

    Attributes:
        group: ``embedding``, ``head``, ``linear``, ``norm``, ``rope`` or ``bias``.
        spec: Its name, type and shape.
        quantized_for: The node that reads it as codes, scales or zero points; None for floats.
        weights: Model weights that it holds; 0 for scales, zero points and tables.
        shared: True if its bytes are those of a tensor before it.
    """

    group: str
    spec: TensorSpec
    quantized_for: NodeProto | None
    weights: int
    shared: bool


def read_tensors(model: ModelProto) -> list[GraphTensor]:
    """Return every external initializer with its use. Their bytes must all lie in one file."""
    # A tensor may be given another shape or type on its way to what it is for.
    passed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _PASSING}
    readers: dict[str, tuple[NodeProto, int]] = {}
    for node in model.graph.node:
        if node.op_type not in _PASSING:
            for index, name in enumerate(node.input):
                readers.setdefault(passed.get(name, name), (node, index))
    head, seen, found = _head(model), set(), []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name in readers:
            node, index = readers[tensor.name]
            offset = next(entry.value for entry in tensor.external_data if entry.key == "offset")
            found.append(_describe(tensor, node, index, head=node == head, shared=offset in seen))
            seen.add(offset)
    return found


def model_facts(folder: GenaiFolder, tensors: Iterable[GraphTensor]) -> ModelFacts:
    """Return the model's facts from configuration and graph.

    ``intermediate_size`` is the widest input of a layer that gives hidden states: that of the second MLP projection.
    How positions become angles lies in tables, from which it is not read back: such packages cannot shift a cache.
    """
    decoder, section = folder.decoder, folder.model_section
    hidden = decoder.integer("hidden_size")
    window, sliding = _sliding_layers(folder.model)
    every = tuple(range(decoder.integer("num_hidden_layers")))
    return ModelFacts(
        model_type=section.text("type"),
        hidden_size=hidden,
        intermediate_size=max((k for k, n in _products(folder.model) if n == hidden), default=4 * hidden),
        num_hidden_layers=decoder.integer("num_hidden_layers"),
        num_attention_heads=decoder.integer("num_attention_heads"),
        num_key_value_heads=decoder.integer("num_key_value_heads"),
        head_dim=decoder.integer("head_size"),
        vocab_size=section.integer("vocab_size"),
        max_position_embeddings=section.integer("context_length"),
        sliding_window=window,
        sliding_layers=None if window is None or sliding == every else sliding,
        tie_word_embeddings=not any(tensor.group == "head" and not tensor.shared for tensor in tensors),
        parameters=sum(tensor.weights for tensor in tensors),
    )


def describe_groups(tensors: Iterable[GraphTensor]) -> Precision:
    """Return the precision of each group with its bytes, under the name of what most weights have."""
    sizes: dict[tuple[str, str, int, int], int] = {}
    weights: dict[str, int] = {}
    for tensor in tensors:
        if tensor.shared:
            continue
        bits, block = 8 * np.dtype(tensor.spec.dtype).itemsize, 0
        if tensor.quantized_for is not None:
            bits, block = _bits(tensor.quantized_for), _integer(tensor.quantized_for, "block_size")
        dtype = f"uint{bits}" if block else f"float{bits}"
        key = (tensor.group, dtype, bits, block)
        sizes[key] = sizes.get(key, 0) + tensor.spec.nbytes
        weights[dtype] = weights.get(dtype, 0) + tensor.weights
    groups: dict[str, TensorGroup] = {}
    for (group, dtype, bits, block), size in sizes.items():
        name = group if group not in groups else f"{group}.{bits}bit-{block}" if block else f"{group}.{dtype}"
        groups[name] = TensorGroup(name=name, dtype=dtype, bits=bits, block_size=block or None, length_bytes=size)
    most = max(weights, key=lambda dtype: weights[dtype])
    return Precision(name=_PRECISION_NAMES.get(most, "fp32"), groups=tuple(groups.values()))


def resident_tensors(tensors: Iterable[GraphTensor]) -> int:
    """Return the bytes of the weights once the CPU's kernels have loaded them."""
    return sum(_resident_bytes(tensor) for tensor in tensors)


def _resident_bytes(tensor: GraphTensor) -> int:
    if tensor.quantized_for is None or tensor.spec.dtype != np.float16:
        return packed_bytes(tensor.spec)
    # Scales are cast to float32 when loaded; those of a table that rows are looked up from also stay as they are.
    return tensor.spec.nbytes * (3 if tensor.group == "embedding" else 2)


def _describe(tensor: TensorProto, node: NodeProto, index: int, *, head: bool, shared: bool) -> GraphTensor:
    spec = TensorSpec(tensor.name, helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims))
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    group = _group(node, index, head=head)
    quantized = node if node.op_type in _QUANTIZED_OPERATORS and group != "bias" else None
    weights = elements
    if group == "rope" or shared:
        weights = 0
    elif quantized is not None:
        weights = 8 * spec.nbytes // _bits(node) if index in _CODE_INPUTS[node.op_type] else 0
    return GraphTensor(group, spec, quantized, weights, shared)


def _group(node: NodeProto, index: int, *, head: bool) -> str:
    operator = node.op_type
    if operator in ("Gather", "GatherBlockQuantized"):
        return "embedding"
    if operator == "GroupQueryAttention":
        return "rope"
    if "Normalization" in operator:
        return "norm"
    if operator == "Add" or (operator == "MatMulNBits" and index == _BIAS_INPUT):
        return "bias"
    return "head" if head else "linear"


def _head(model: ModelProto) -> NodeProto | None:
    """Return the product that gives the logits; behind it there may be a cap or a cast."""
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers.get("logits")
    while node is not None and node.op_type not in _PRODUCTS:
        node = next((makers[name] for name in node.input if name in makers), None)
    return node


def _products(model: ModelProto) -> Iterator[tuple[int, int]]:
    """Yield (K, N) of every product with a weight."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield _integer(node, "K"), _integer(node, "N")
        elif node.op_type in _PRODUCTS and len(shapes.get(node.input[1], ())) == 2:
            rows, columns = shapes[node.input[1]]
            yield (columns, rows) if _integer(node, "transB") else (rows, columns)


def _sliding_layers(model: ModelProto) -> tuple[int | None, tuple[int, ...]]:
    """Return the window of the layers that have one, and these layers."""
    windows = {
        int(node.output[1].split(".")[1]): _integer(node, "local_window_size")
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
    }
    sliding = tuple(sorted(layer for layer, window in windows.items() if window > 0))
    return (windows[sliding[0]] if sliding else None), sliding


def _bits(node: NodeProto) -> int:
    return _integer(node, "bits") or _integer(node, "expert_weight_bits") or 4


def _integer(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
