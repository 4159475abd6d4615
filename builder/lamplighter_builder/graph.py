"""A typed builder of ONNX graphs: scoped node names, constants stored once, weights declared but not yet read.

Nodes carry hierarchical names (``/model/layers.0/self_attn/qkv_proj/MatMulNBits``). A weight is declared with its
place in the graph and a recipe of how it is made from checkpoint tensors; ``build.py`` runs the recipes one by one, so
that no more than one weight is in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Attribute = int | float | str | Sequence[int]

ONNX_OPSET: Final = 23
CONTRIB_DOMAIN: Final = "com.microsoft"
_IR_VERSION: Final = 11


@dataclass(frozen=True, slots=True)
class Value:
    """An edge of the graph, known by its name."""

    name: str


NO_VALUE: Final = Value("")
"""Stands for an optional input that is left out."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor that a weight is made from, and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An initializer: name, numpy dtype and shape."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Weight:
    """One or more initializers that are made together.

    Attributes:
        group: Name of the precision group in the manifest: ``embedding``, ``head``, ``linear``, ``bias``, ``norm``
            or ``rope``.
        sources: Checkpoint tensors, in the order that ``convert`` takes them; empty for computed tables.
        outputs: Initializers, in the order that ``convert`` gives them.
        convert: From float32 sources to the outputs' arrays.
        repack: From sources that the checkpoint holds quantized to the outputs' arrays, or None where they do not
            fit bit for bit; asked before ``convert``. None if the weight is never quantized.
        format: Format of the codes, or None if the outputs are floats.
    """

    group: str
    sources: tuple[Source, ...]
    outputs: tuple[TensorSpec, ...]
    convert: Callable[[Sequence[FloatArray]], Sequence[Array]]
    repack: Callable[[Sequence[QuantizedMatrix]], Sequence[Array] | None] | None = None
    format: BlockFormat | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Where an initializer's bytes lie in the weights file."""

    offset: int
    length: int


@dataclass(slots=True)
class Graph:
    """An ONNX graph under construction."""

    name: str
    weights: list[Weight] = field(default_factory=list)
    _scopes: list[str] = field(default_factory=list)
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _node_names: set[str] = field(default_factory=set)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _inline: dict[str, onnx.TensorProto] = field(default_factory=dict)
    _external: dict[str, TensorSpec] = field(default_factory=dict)
    _aliases: dict[str, str] = field(default_factory=dict)
    _computed: list[TensorSpec] = field(default_factory=list)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put ``name`` before the names of all nodes made inside; dots in it stay as they are."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> Value:
        """Declare a graph input; a string in ``shape`` names a dimension that varies."""
        self._inputs.append(_value_info(name, dtype, shape))
        return Value(name)

    def input_with_default(self, name: str, default: Array, shape: Sequence[int | str] | None = None) -> Value:
        """Declare an overridable initializer: a graph input that need not be fed.

        ``shape`` is what may be fed, by default that of ``default``.
        """
        self._inputs.append(_value_info(name, default.dtype, default.shape if shape is None else shape))
        self._inline[name] = numpy_helper.from_array(default, name)
        return Value(name)

    def publish(self, value: Value, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Make a node's output a graph output under ``name``, which replaces the value's own name.

        Raises:
            ValueError: If no node makes the value.
        """
        found = False
        for node in self._nodes:
            for edges in (node.input, node.output):
                for index, edge in enumerate(edges):
                    if edge == value.name:
                        edges[index] = name
                        found = True
        if not found:
            raise ValueError(f"no node makes {value.name}")
        self._outputs.append(_value_info(name, dtype, shape))

    def constant(self, value: Array) -> Value:
        """Return a small constant kept inside the model file; equal constants are stored once."""
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:12]
        name = f"constant.{value.dtype}.{'x'.join(map(str, value.shape)) or 'scalar'}.{digest}"
        self._inline.setdefault(name, numpy_helper.from_array(value, name))
        return Value(name)

    def weight(self, weight: Weight) -> tuple[Value, ...]:
        """Declare a weight and return its initializers.

        Raises:
            ValueError: If an initializer of that name exists.
        """
        for spec in weight.outputs:
            self._claim(spec)
        self.weights.append(weight)
        return tuple(Value(spec.name) for spec in weight.outputs)

    def alias(self, spec: TensorSpec, of: Value) -> Value:
        """Declare an initializer that reads the bytes of another weight, in a shape of its own.

        Raises:
            ValueError: If the sizes differ, or an initializer of that name exists.
        """
        if spec.nbytes != self._external[of.name].nbytes:
            raise ValueError(f"{spec.name} has {spec.nbytes} bytes, {of.name} {self._external[of.name].nbytes}")
        self._claim(spec)
        self._aliases[spec.name] = of.name
        return Value(spec.name)

    def computed(self, spec: TensorSpec) -> None:
        """Note a node's output that onnxruntime computes once, when it loads the model, and keeps.

        It depends on initializers alone, and they are let go.
        """
        self._computed.append(spec)

    def op(
        self,
        op_type: str,
        inputs: Sequence[Value],
        *,
        domain: str = "",
        attributes: Mapping[str, Attribute] | None = None,
        count: int = 1,
    ) -> tuple[Value, ...]:
        """Append a node named after the open scopes and its operator.

        Args:
            op_type: Operator name.
            inputs: Values; ``NO_VALUE`` for an optional one that is left out.
            domain: Operator domain, empty for ONNX's own.
            attributes: Attributes of the node.
            count: Number of outputs.
        """
        base = "/" + "/".join([*self._scopes, op_type])
        name, repeat = base, 1
        while name in self._node_names:
            repeat += 1
            name = f"{base}_{repeat}"
        self._node_names.add(name)
        outputs = tuple(Value(f"{name}/output_{index}") for index in range(count))
        node = helper.make_node(
            op_type, [value.name for value in inputs], [value.name for value in outputs], name=name, domain=domain
        )
        node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes or {}).items())
        self._nodes.append(node)
        return outputs

    def finish(self, location: str, regions: Mapping[str, Region]) -> onnx.ModelProto:
        """Return the model, its weights pointing into the external file ``location``.

        Args:
            location: File name of the weights beside the model.
            regions: Place of every weight in that file.

        Raises:
            KeyError: If a weight has no region.
        """
        initializers = list(self._inline.values())
        for name, spec in self._external.items():
            initializers.append(_external_tensor(spec, location, regions[self._aliases.get(name, name)]))
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializers)
        return helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in self.domains().items()],
            producer_name="lamplighter-builder",
        )

    def domains(self) -> dict[str, int]:
        """Return every operator domain in use and its opset version; ONNX's own is ``""``."""
        return {"": ONNX_OPSET} | {node.domain: 1 for node in self._nodes if node.domain}

    def external(self) -> Mapping[str, TensorSpec]:
        """Return all external initializers by name, aliases too."""
        return dict(self._external)

    def computed_tensors(self) -> Sequence[TensorSpec]:
        """Return what is kept of constants that are computed when the model is loaded."""
        return tuple(self._computed)

    def operators(self) -> dict[str, int]:
        """Return how many nodes there are of each operator, most frequent first."""
        return dict(Counter(node.op_type for node in self._nodes).most_common())

    def _claim(self, spec: TensorSpec) -> None:
        if spec.name in self._external:
            raise ValueError(f"initializer {spec.name} is declared twice")
        self._external[spec.name] = spec


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _external_tensor(spec: TensorSpec, location: str, region: Region) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=spec.name,
        data_type=helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)),
        dims=spec.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", str(region.offset)), ("length", str(region.length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
