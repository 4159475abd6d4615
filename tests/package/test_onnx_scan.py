"""The scan of a graph file: what it asks for is found, whatever it is hidden in, and garbage is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.errors import GraphError
from lamplighter_agent.package.onnx_scan import KNOWN_DOMAINS, check_graph, scan_graph
from support.graphs import graph_bytes, nested_graphs

FILES = frozenset({"model.onnx", "model.onnx.data"})


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_domains_and_locations_are_found(graph: Path) -> None:
    graph.write_bytes(graph_bytes(domains=("", "my.ops"), locations=("a.bin", "b.bin")))
    assert scan_graph(graph) == (frozenset({"", "my.ops"}), frozenset({"a.bin", "b.bin"}))


def test_real_graph_is_read_as_the_onnx_library_reads_it(tiny_package: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the builder's extra is not installed")
    model = onnx.load(tiny_package / "model.onnx", load_external_data=False)
    needs = scan_graph(tiny_package / "model.onnx")
    assert needs.domains == {node.domain for node in model.graph.node}
    assert needs.locations == {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    check_graph(tiny_package / "model.onnx", KNOWN_DOMAINS, FILES)


def test_domain_inside_a_branch_is_found(graph: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the builder's extra is not installed")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Do", [], ["y"], domain="hidden.ops")], "inner", [], [])
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    outer = onnx.helper.make_graph([node], "outer", [], [])
    graph.write_bytes(onnx.helper.make_model(outer).SerializeToString())
    with pytest.raises(GraphError, match=r"hidden\.ops"):
        check_graph(graph, KNOWN_DOMAINS, FILES)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/b", "", ".", "model.onnx.data\0x", "other.bin"])
def test_external_data_elsewhere_is_refused(graph: Path, location: str) -> None:
    graph.write_bytes(graph_bytes(locations=(location,)))
    with pytest.raises(GraphError):
        check_graph(graph, KNOWN_DOMAINS, FILES)


@pytest.mark.parametrize(
    "content", [b"", b"\x3a", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"PK\x03\x04", nested_graphs(100)]
)
def test_what_is_no_model_is_refused(graph: Path, content: bytes) -> None:
    graph.write_bytes(content)
    with pytest.raises(GraphError, match="not an ONNX model"):
        scan_graph(graph)


@given(content=st.binary(max_size=400) | st.binary(max_size=60).map(lambda tail: graph_bytes() + tail))
def test_nothing_but_a_graph_error_comes_of_hostile_bytes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.onnx"
    path.write_bytes(content)
    refused = None
    try:
        scan_graph(path)
    except GraphError as error:
        refused = error
    assert refused is None or str(path) in refused.message
