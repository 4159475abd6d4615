"""What a graph file asks for beyond itself: operator domains and external data, read without the onnx library.

A graph comes from outside. onnxruntime would find most of this while it loads; here it is found from the bytes, before
anything is loaded. Read is only the wire format of Protocol Buffers (fields by number, as in ``onnx.proto``); what is
not needed is skipped, so that the cost is one pass over a file without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from lamplighter_agent.errors import GraphError, ManifestError
from lamplighter_agent.package.layout import check_name

KNOWN_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Operator domains of every official onnxruntime."""

MAX_GRAPH_BYTES: Final = 256 * 1024 * 1024
_MAX_DEPTH: Final = 32
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL: Final = 1

# Field numbers of onnx.proto, by message.
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_FUNCTION_NODE = 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE: Final = frozenset({22, 23})
_SPARSE_TENSORS: Final = frozenset({1, 2})
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


class GraphNeeds(NamedTuple):
    """What a graph asks for.

    Attributes:
        domains: Operator domains of its nodes; the standard one is the empty text. That a domain is imported says
            nothing: what onnxruntime writes imports all that it knows.
        locations: Files that hold its external data.
    """

    domains: frozenset[str]
    locations: frozenset[str]


def scan_graph(path: Path) -> GraphNeeds:
    """Read what a graph file asks for.

    Raises:
        GraphError: If it is too large or no ONNX model.
        OSError: If it cannot be read.
    """
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise GraphError(f"{path}: larger than the {MAX_GRAPH_BYTES} bytes that a graph without weights may have")
    scan = _Scan()
    try:
        scan.model(memoryview(path.read_bytes()))
    except (ValueError, IndexError) as error:
        raise GraphError(f"{path}: not an ONNX model: {error}") from error
    return GraphNeeds(frozenset(scan.domains), frozenset(scan.locations))


def check_graph(path: Path, domains: frozenset[str], files: frozenset[str]) -> None:
    """Check that a graph file asks for nothing but known operators and files of its own directory.

    Args:
        path: The file.
        domains: Operator domains that there are.
        files: Names of the package's files.

    Raises:
        GraphError: Naming what it asks for.
        OSError: If it cannot be read.
    """
    needs = scan_graph(path)
    if unknown := sorted(needs.domains - domains):
        raise GraphError(f"{path}: uses the operator domain {unknown[0]!r}", hint="custom operators are never loaded")
    for location in sorted(needs.locations):
        try:
            check_name(location, "external data file")
        except ManifestError as error:
            raise GraphError(
                f"{path}: {error.message}", hint="external data lies in the package's directory"
            ) from error
        if location not in files:
            raise GraphError(f"{path}: its external data {location!r} is no file of the package")


class _Scan:
    """Walks the messages that can hold a domain or a location."""

    def __init__(self) -> None:
        self.domains: set[str] = set()
        self.locations: set[str] = set()

    def model(self, data: memoryview) -> None:
        graphs = 0
        for number, value in _fields(data):
            if number == _MODEL_GRAPH:
                graphs += 1
                self._graph(_message(value), 0)
            elif number == _MODEL_FUNCTION:
                self._function(_message(value))
        if graphs != 1:
            raise ValueError(f"{graphs} graphs")

    def _function(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number == _FUNCTION_NODE:
                self._node(_message(value), 0)

    def _graph(self, data: memoryview, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("graphs are nested too deeply")
        for number, value in _fields(data):
            if number == _GRAPH_NODE:
                self._node(_message(value), depth)
            elif number == _GRAPH_TENSOR:
                self._tensor(_message(value))
            elif number == _GRAPH_SPARSE:
                self._sparse(_message(value))

    def _node(self, data: memoryview, depth: int) -> None:
        for number, value in _fields(data):
            if number == _NODE_DOMAIN:
                self.domains.add(_text(value))
            elif number == _NODE_ATTRIBUTE:
                self._attribute(_message(value), depth)

    def _attribute(self, data: memoryview, depth: int) -> None:
        for number, value in _fields(data):
            if number in {_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS}:
                self._tensor(_message(value))
            elif number in {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS}:
                self._graph(_message(value), depth + 1)
            elif number in _ATTRIBUTE_SPARSE:
                self._sparse(_message(value))

    def _sparse(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number in _SPARSE_TENSORS:
                self._tensor(_message(value))

    def _tensor(self, data: memoryview) -> None:
        external, locations = False, []
        for number, value in _fields(data):
            if number == _TENSOR_LOCATION:
                external = value == _EXTERNAL
            elif number == _TENSOR_EXTERNAL:
                entry = {key: _text(text) for key, text in _fields(_message(value))}
                if entry.get(_ENTRY_KEY) == "location":
                    locations.append(entry.get(_ENTRY_VALUE, ""))
        if external and not locations:
            raise ValueError("a tensor's external data has no location")
        self.locations.update(locations)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _varint(data, position)
        elif kind in {_FIXED64, _FIXED32}:
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if length > len(data) - position:
            raise ValueError("a field is longer than its message")
        yield number, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")  # noqa: TRY004 (the file is wrong, not a type)
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8")
