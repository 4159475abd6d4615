"""Prompts on an int8 cache, computed from keys and values that are unpacked once for each piece of a prompt.

onnxruntime's attention on 8-bit codes unpacks them anew for every row of a prompt, which takes three times as long as
float32 where the text is long. Here each attention node of the graph becomes a choice: for several tokens, the new keys
and values are rotated, rounded to codes and put into the cache (``TensorScatter``, in place, as past and present are
one buffer); then the layer's codes are unpacked, and the float32 kernel reads them. A decode step takes the node as it
was, the one that reads codes.

What the kernel reads are values of codes only, also for the tokens of the same piece, so a prompt has the same logits
however it is cut and whatever of it was cached.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine import protobuf_nodes as nodes
from lamplighter_agent.engine.protobuf import edit_fields, encode_bytes, encode_number, read_fields
from lamplighter_agent.engine.protobuf_nodes import encode_node

MANY: Final = "prompt_many"
PAST: Final = "prompt_past"
END: Final = "prompt_end"
POSITIONS: Final = "prompt_positions"
NOTHING: Final = "prompt_nothing"
INPUTS: Final = {
    MANY: nodes.BOOL,
    PAST: nodes.INT64,
    END: nodes.INT64,
    POSITIONS: nodes.INT64,
    NOTHING: nodes.FLOAT,
}
"""Graph inputs that only the engine knows: bool [1], whether several tokens are computed; how many are before them, and
with them, int64 [1]; their positions, int64 [1, tokens]; no keys, float32 [1, 0, num_key_value_heads * head_dim]."""

_TENSOR_SCATTER_OPSET: Final = 24

_MICROSOFT: Final = "com.microsoft"
_PAST_KEY: Final = 3
_LAST: Final = 5
_TABLES: Final = 7
_POSITIONS: Final = 9
_OWN: Final = frozenset(
    {"do_rotary", "rotary_interleaved", "k_quant_type", "v_quant_type", "kv_cache_bit_width", "sliding_window_cache"}
)
"""Attributes of what is done here before, or does not apply to float32."""

_SHAPE: Final = "unpack_shape"
_ROTATED: Final = "unpack_rotated"
_SPLIT: Final = "unpack_split"
_LEAST: Final = "unpack_least"
_MOST: Final = "unpack_most"
_BEGIN: Final = "unpack_begin"
_AXIS: Final = "unpack_axis"

ScaleArray = NDArray[np.float32]


class PromptGraph(NamedTuple):
    """Writes the choices of one graph, whose attention nodes are alike but that some may not rotate.

    Attributes:
        heads: Query heads.
        kv_heads: ``num_key_value_heads``.
        head_dim: Features of a head.
        rotary_dim: Features of a head that are rotated by nodes that rotate; 0 if none does.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    def initializers(self, scales: list[tuple[ScaleArray, ScaleArray]]) -> list[bytes]:
        """Return the constants of the choices; ``scales`` are those of each layer, float32 [heads, head_dim]."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        constants = [
            nodes.int64_initializer(_SHAPE, [0, 0, self.kv_heads, self.head_dim]),
            nodes.int64_initializer(_ROTATED, [width + kv_width, kv_width]),
            nodes.int64_initializer(_SPLIT, [width, kv_width]),
            nodes.int64_initializer(_BEGIN, [0]),
            nodes.int64_initializer(_AXIS, [2]),
            nodes.initializer(_LEAST, nodes.FLOAT, [], struct.pack("<f", -128.0)),
            nodes.initializer(_MOST, nodes.FLOAT, [], struct.pack("<f", 127.0)),
        ]
        shape = [1, self.kv_heads, 1, self.head_dim]
        for layer, pair in enumerate(scales):
            for kind, scale in zip(("key", "value"), pair, strict=True):
                data = scale.astype("<f4").tobytes()
                constants.append(nodes.initializer(_scale(layer, kind), nodes.FLOAT, shape, data))
        return constants

    def choice(self, original: memoryview, coded: bytes, layer: int) -> bytes:
        """Return the node that takes ``coded``, the node on codes, for single tokens, and unpacks for several."""
        node = nodes.read_node(original)
        branches = []
        for name, body in (("then_branch", self._unpacked(node, layer)), ("else_branch", [_renamed(coded, layer)])):
            way = name.partition("_")[0]
            kinds = zip(_results(layer, way), (nodes.FLOAT, nodes.INT8, nodes.INT8), strict=True)
            branches.append(nodes.graph_attribute(name, body, list(kinds)))
        return encode_node("If", [MANY], node.outputs, branches)

    def _unpacked(self, node: nodes.Node, layer: int) -> list[bytes]:
        out, *targets = _results(layer, "then")
        written, query, key, value = self._rotated(node, layer)
        unpacked = []
        for kind, source, past, target in zip(
            ("key", "value"), (key, value), node.inputs[_PAST_KEY:_LAST], targets, strict=True
        ):
            written += self._written(source, past, target, _scale(layer, kind))
            written += _read(target, _scale(layer, kind))
            unpacked.append(f"{target}.unpacked")
        inputs = [query, NOTHING, NOTHING, *unpacked, *node.inputs[_LAST:_TABLES]]
        attributes = [raw for name, raw in node.attributes.items() if name not in _OWN]
        # Only with outputs for present keys and values does the operator take the kernel that needs little memory.
        outputs = [out, f"{out}.key", f"{out}.value"]
        # … which nobody reads; what nobody reads would stay until the end of the step.
        readers = [encode_node("Shape", [name], [f"{name}.shape"]) for name in outputs[1:]]
        return [*written, encode_node(nodes.ATTENTION, inputs, outputs, attributes, domain=_MICROSOFT), *readers]

    def _rotated(self, node: nodes.Node, layer: int) -> tuple[list[bytes], str, str, str]:
        """Return nodes that give the rotated queries, rotated keys and the values, and these names."""
        name, written = f"unpack.{layer}", list[bytes]()
        query, key, value = node.inputs[:_PAST_KEY]
        packed = not key
        axis = [nodes.number_attribute("axis", 2)]
        if packed:
            written.append(encode_node("Split", [query, _ROTATED], [f"{name}.query_key", f"{name}.value"], axis))
            query, value = f"{name}.query_key", f"{name}.value"
        if node.numbers.get("do_rotary", 0):
            turned = [(query, self.heads + self.kv_heads)] if packed else [(query, self.heads), (key, self.kv_heads)]
            written += [
                self._turn(node, source, heads, f"{name}.turned{i}") for i, (source, heads) in enumerate(turned)
            ]
            query, key = f"{name}.turned0", "" if packed else f"{name}.turned1"
        if packed:
            written.append(encode_node("Split", [query, _SPLIT], [f"{name}.query", f"{name}.key"], axis))
            query, key = f"{name}.query", f"{name}.key"
        return written, query, key, value

    def _turn(self, node: nodes.Node, source: str, heads: int, target: str) -> bytes:
        positions = node.inputs[_POSITIONS] if len(node.inputs) > _POSITIONS else ""
        attributes = [
            nodes.number_attribute("num_heads", heads),
            nodes.number_attribute("interleaved", node.numbers.get("rotary_interleaved", 0)),
        ]
        if self.rotary_dim != self.head_dim:
            attributes.append(nodes.number_attribute("rotary_embedding_dim", self.rotary_dim))
        inputs = [source, positions or POSITIONS, *node.inputs[_TABLES:_POSITIONS]]
        return encode_node("RotaryEmbedding", inputs, [target], attributes, domain=_MICROSOFT)

    def _written(self, source: str, past: str, target: str, scale: str) -> list[bytes]:
        """Return nodes that put [1, tokens, heads * head_dim] into the cache as codes."""
        names = [f"{target}.{step}" for step in ("split", "heads", "scaled", "rounded", "bounded", "codes")]
        return [
            encode_node("Reshape", [source, _SHAPE], names[:1]),
            encode_node("Transpose", names[:1], names[1:2], [nodes.numbers_attribute("perm", [0, 2, 1, 3])]),
            encode_node("Div", [names[1], scale], names[2:3]),
            encode_node("Round", names[2:3], names[3:4]),
            encode_node("Clip", [names[3], _LEAST, _MOST], names[4:5]),
            encode_node("Cast", names[4:5], names[5:6], [nodes.number_attribute("to", nodes.INT8)]),
            encode_node("TensorScatter", [past, names[5], PAST], [target]),
        ]


def prompt_graph(model: memoryview, layers: int, head_dim: int) -> PromptGraph | None:
    """Return how the attention nodes of a float32 model can be changed; None if they are of a kind not known here.

    Raises:
        PackageError: If the bytes are no model.
    """
    widths = dict[str, int]()
    attention = list[nodes.Node]()
    for field in read_fields(model):
        if field.number != nodes.MODEL_GRAPH or field.content is None:
            continue
        for part in read_fields(field.content):
            if part.number == nodes.GRAPH_INITIALIZER and part.content is not None:
                _note_width(part.content, widths)
            elif part.number == nodes.GRAPH_NODE and part.content is not None:
                node = nodes.read_attention(part.content)
                if node is not None:
                    attention.append(node)
    shapes = [_shape(node, widths, head_dim) for node in attention]
    known = [shape for shape in shapes if shape is not None]
    rotated = {shape.rotary_dim for shape in known if shape.rotary_dim} or {0}
    found = {shape._replace(rotary_dim=width) for shape in known for width in rotated}
    return found.pop() if len(found) == 1 and len(known) == len(attention) == layers else None


def newer_opset(opset: memoryview) -> bytes:
    """Return an ``OperatorSetIdProto`` that has ``TensorScatter``, if it is that of ONNX's own operators."""
    domain, version = b"", 0
    for field in read_fields(opset):
        if field.number == nodes.OPSET_DOMAIN and field.content is not None:
            domain = bytes(field.content)
        elif field.number == nodes.OPSET_VERSION and field.value is not None:
            version = field.value
    if domain not in {b"", b"ai.onnx"} or version >= _TENSOR_SCATTER_OPSET:
        return bytes(opset)
    return encode_bytes(nodes.OPSET_DOMAIN, domain) + encode_number(nodes.OPSET_VERSION, _TENSOR_SCATTER_OPSET)


def _shape(node: nodes.Node, widths: dict[str, int], head_dim: int) -> PromptGraph | None:
    heads, kv_heads = node.numbers.get("num_heads", 0), node.numbers.get("kv_num_heads", 0)
    whole = len(node.inputs) >= _TABLES and len(node.outputs) == 3 and heads > 0 and kv_heads > 0
    if not whole or any(node.inputs[_POSITIONS + 1 :]):
        return None  # a bias or sinks
    if not node.numbers.get("do_rotary", 0):
        return PromptGraph(heads, kv_heads, head_dim, 0)
    half = widths.get(node.inputs[_TABLES]) if len(node.inputs) > _TABLES + 1 else None
    return None if half is None else PromptGraph(heads, kv_heads, head_dim, 2 * half)


def _note_width(tensor: memoryview, widths: dict[str, int]) -> None:
    """Enter a matrix's last axis by its name."""
    dims, name = list[int](), ""
    for field in read_fields(tensor):
        if field.number == nodes.INITIALIZER_DIMS and field.value is not None:
            dims.append(field.value)
        elif field.number == nodes.INITIALIZER_NAME and field.content is not None:
            name = bytes(field.content).decode("utf-8", "replace")
    if len(dims) == 2:
        widths[name] = dims[1]


def _read(target: str, scale: str) -> list[bytes]:
    """Return nodes that unpack the tokens so far, float32 [1, heads, tokens, head_dim]."""
    return [
        encode_node("Slice", [target, _BEGIN, END, _AXIS], [f"{target}.held"]),
        encode_node("Cast", [f"{target}.held"], [f"{target}.cast"], [nodes.number_attribute("to", nodes.FLOAT)]),
        encode_node("Mul", [f"{target}.cast", scale], [f"{target}.unpacked"]),
    ]


def _renamed(node: bytes, layer: int) -> bytes:
    """Return a node with the names of the other branch's outputs."""
    names = iter(_results(layer, "else"))
    return edit_fields(memoryview(node), {nodes.NODE_OUTPUT: lambda _: next(names).encode()})


def _results(layer: int, way: str) -> list[str]:
    return [f"unpack.{layer}.{way}.{kind}" for kind in ("out", "key", "value")]


def _scale(layer: int, kind: str) -> str:
    return f"unpack_scale.{layer}.{kind}"
