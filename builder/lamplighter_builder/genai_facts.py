"""What a foreign graph tells of itself: sizes, precision of its tensors, memory. Its folder names only some of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lamplighter_agent.package.manifest import ModelFacts, Precision, TensorGroup
from lamplighter_builder.genai_folder import GenaiFolder
from lamplighter_builder.graph import TensorSpec
from lamplighter_builder.memory import packed_bytes
from lamplighter_builder.precision import PrecisionName

_BIAS_INPUT: Final = 5
_PASSING: Final = ("Reshape", "Transpose", "Cast", "BitShift", "BitwiseAnd", "BitwiseOr")
"""Operators behind which a tensor is still the same weight; the bitwise ones put planes of codes together."""

_PRODUCTS: Final = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
_CODE_INPUTS: Final[Mapping[str, tuple[int, ...]]] = {
    "MatMulNBits": (1,),
    "GatherBlockQuantized": (0,),
    "QMoE": (2, 5, 8),
}
"""Inputs of the operators on quantized weights that are codes."""

_ZERO_POINT_INPUTS: Final[Mapping[str, tuple[int, ...]]] = {
    "MatMulNBits": (3,),
    "GatherBlockQuantized": (3,),
    "QMoE": (11, 12, 13),
}

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
        bits: Bits a weight in the file, where ``quantized_for`` is given.
        symmetric: True where there are no zero points in the file.
        joined: What is made of it when the model is loaded, if it is a plane of codes; it is then let go.
    """

    group: str
    spec: TensorSpec
    quantized_for: NodeProto | None
    weights: int
    shared: bool
    bits: int = 0
    symmetric: bool = True
    joined: tuple[TensorSpec, ...] | None = None


def read_tensors(model: ModelProto) -> list[GraphTensor]:
    """Return every external initializer with its use. Their bytes must all lie in one file."""
    trace = _Trace(model)
    readers: dict[str, list[_Use]] = {}
    for node in model.graph.node:
        if node.op_type not in _PASSING:
            for index, name in enumerate(node.input):
                for place, origin in enumerate(trace.origins(name)):
                    readers.setdefault(origin, []).append(_Use(node, index, place))
    head, seen, found = _head(model), set(), []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name in readers:
            offset = next(entry.value for entry in tensor.external_data if entry.key == "offset")
            found.append(_describe(tensor, readers[tensor.name], trace, head=head, shared=offset in seen))
            seen.add(offset)
    return found


@dataclass(frozen=True, slots=True)
class _Use:
    """A node that reads a tensor, or what is made of it.

    Attributes:
        node: The node.
        index: Which of its inputs.
        plane: Which plane of that input's codes the tensor is, the upper bits first; 0 for a tensor on its own.
    """

    node: NodeProto
    index: int
    plane: int


class _Trace:
    """Follows what nodes read back to initializers."""

    def __init__(self, model: ModelProto) -> None:
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._small = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}
        self._initializers = {tensor.name for tensor in model.graph.initializer}

    def origins(self, name: str) -> list[str]:
        """Return the initializers that a value is made of: several where planes are put together, perhaps none."""
        node = self._makers.get(name)
        if node is None:
            return [name] if name in self._initializers else []
        if node.op_type == "BitwiseOr":
            return [origin for part in node.input for origin in self.origins(part)]
        return self.origins(node.input[0]) if node.op_type in _PASSING else []

    def code_bits(self, node: NodeProto) -> int:
        """Return the bits a weight in the file of what a node on quantized weights reads."""
        widths = self._widths(node.input[_CODE_INPUTS[node.op_type][0]])
        return sum(widths) if len(widths) > 1 else _bits(node)

    def symmetric(self, node: NodeProto) -> bool:
        """Tell whether a node on quantized weights reads no zero points of the file."""
        places = [place for place in _ZERO_POINT_INPUTS[node.op_type] if place < len(node.input)]
        return not any(self.origins(node.input[place]) for place in places)

    def _widths(self, name: str) -> list[int]:
        """Return the bits that each plane of a value's codes has, as their masks say."""
        node = self._makers.get(name)
        if node is None or node.op_type not in _PASSING:
            return []
        if node.op_type == "BitwiseAnd" and node.input[1] in self._small:
            return [int(numpy_helper.to_array(self._small[node.input[1]]).max()).bit_length()]
        parts = node.input if node.op_type == "BitwiseOr" else node.input[:1]
        return [width for part in parts for width in self._widths(part)]


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
    sizes: dict[TensorGroup, int] = {}
    weights: dict[str, int] = {}
    for tensor in tensors:
        if tensor.shared:
            continue
        group = _group_of(tensor)
        sizes[group] = sizes.get(group, 0) + tensor.spec.nbytes
        weights[group.dtype] = weights.get(group.dtype, 0) + tensor.weights
    groups: dict[str, TensorGroup] = {}
    for group, size in sizes.items():
        name = group.name
        if name in groups:
            name += f".{group.bits}bit-{group.block_size}" if group.block_size else f".{group.dtype}"
        groups[name] = msgspec.structs.replace(group, name=name, length_bytes=size)
    most = max(weights, key=lambda dtype: weights[dtype])
    return Precision(name=_PRECISION_NAMES.get(most, "fp32"), groups=tuple(groups.values()))


def _group_of(tensor: GraphTensor) -> TensorGroup:
    """Return the group that a tensor belongs to, without its bytes."""
    node = tensor.quantized_for
    if node is None:
        bits = 8 * np.dtype(tensor.spec.dtype).itemsize
        return TensorGroup(name=tensor.group, dtype=f"float{bits}", bits=bits)
    return TensorGroup(
        name=tensor.group,
        dtype=f"uint{_bits(node)}",
        bits=tensor.bits,
        block_size=_integer(node, "block_size"),
        symmetric=tensor.symmetric,
        accuracy_level=_integer(node, "accuracy_level") or None,
    )


def resident_tensors(tensors: Iterable[GraphTensor]) -> int:
    """Return the bytes of the weights once the CPU's kernels have loaded them."""
    return sum(_resident_bytes(tensor) for tensor in tensors)


def _resident_bytes(tensor: GraphTensor) -> int:
    if tensor.joined is not None:
        return sum(packed_bytes(spec) for spec in tensor.joined)
    if tensor.quantized_for is None or tensor.spec.dtype != np.float16:
        return packed_bytes(tensor.spec)
    # Scales are cast to float32 when loaded; those of a table that rows are looked up from also stay as they are.
    return tensor.spec.nbytes * (3 if tensor.group == "embedding" else 2)


def _describe(
    tensor: TensorProto, uses: Sequence[_Use], trace: _Trace, *, head: NodeProto | None, shared: bool
) -> GraphTensor:
    spec = TensorSpec(tensor.name, helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims))
    node, index = uses[0].node, uses[0].index
    group = _group(node, index, head=node == head)
    counted = group != "rope" and not shared
    if node.op_type not in _QUANTIZED_OPERATORS or group == "bias":
        return GraphTensor(group, spec, None, int(np.prod(tensor.dims, dtype=np.int64)) if counted else 0, shared)
    codes, bits = index in _CODE_INPUTS[node.op_type], trace.code_bits(node)
    weights = 8 * spec.nbytes // _bits(node) if codes and counted else 0
    joined: tuple[TensorSpec, ...] | None = None
    if codes and bits != _bits(node):
        # Codes are counted with their upper plane, in which a weight has half a byte.
        weights = 2 * spec.nbytes if counted and uses[0].plane == 0 else 0
        joined = tuple(_joined(spec, uses)) if uses[0].plane == 0 else ()
    return GraphTensor(group, spec, node, weights, shared, bits, trace.symmetric(node), joined)


def _joined(plane: TensorSpec, uses: Sequence[_Use]) -> Iterator[TensorSpec]:
    """Yield what is kept of codes whose upper plane, of four bits, is given: as each reader wants them."""
    rows = plane.shape[0]
    features = 2 * plane.nbytes // rows
    for use in uses:
        block = _integer(use.node, "block_size")
        shape = (rows, features // block, block) if use.node.op_type == "MatMulNBits" else (rows, features)
        yield TensorSpec(plane.name, np.uint8, shape)
    # Zero points are written out for all of them, a byte a block.
    yield TensorSpec(plane.name, np.uint8, (rows, features // _integer(uses[0].node, "block_size")))


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
    """Return the widest window of the layers that have one, and these layers: a wider cache suits each of them."""
    windows = {
        int(node.output[1].split(".")[1]): _integer(node, "local_window_size")
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
    }
    sliding = tuple(sorted(layer for layer, window in windows.items() if window > 0))
    return max((windows[layer] for layer in sliding), default=None), sliding


def _bits(node: NodeProto) -> int:
    return _integer(node, "bits") or _integer(node, "expert_weight_bits") or 4


def _integer(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
