"""Graph files of a few bytes: what `scan_graph` reads, written without the onnx library."""

from __future__ import annotations


def graph_bytes(
    *,
    domains: tuple[str, ...] = ("", "com.microsoft"),
    locations: tuple[str, ...] = ("model.onnx.data",),
    padding: bytes = b"",
) -> bytes:
    """Return a model with one node a domain and one external tensor a location.

    Args:
        domains: Operator domains of the nodes.
        locations: Where the tensors lie.
        padding: Bytes for the model's description.
    """
    nodes = b"".join(_field(1, _field(4, b"Op") + _field(7, domain.encode())) for domain in domains)
    tensors = b"".join(_field(5, external_tensor(location)) for location in locations)
    return b"\x08\x0a" + _field(6, padding) + _field(7, nodes + tensors) + _field(8, b"\x10\x15")


def external_tensor(location: str) -> bytes:
    """Return a tensor whose data lies in a file."""
    entry = _field(1, b"location") + _field(2, location.encode())
    return _field(8, b"weights") + _field(13, entry) + b"\x70\x01"


def nested_graphs(depth: int) -> bytes:
    """Return a model whose node has a graph, whose node has a graph, and so on."""
    graph = b""
    for _ in range(depth):
        graph = _field(1, _field(4, b"If") + _field(5, _field(6, graph)))
    return _field(7, graph)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])
