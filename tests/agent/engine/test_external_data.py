from __future__ import annotations

from pathlib import Path

import pytest

from lamplighter_agent.engine.external_data import align_external_data
from lamplighter_agent.engine.protobuf import encode_bytes, read_fields
from lamplighter_agent.errors import EngineError

GRAPH, INITIALIZER, NAME, EXTERNAL, KEY, VALUE = 7, 5, 8, 13, 1, 2
PRODUCER = encode_bytes(2, b"a producer")


def tensor(name: str, entries: dict[str, str]) -> bytes:
    """Return an initializer whose first field is a number, as real ones have."""
    body = bytes([1 << 3, 4]) + encode_bytes(NAME, name.encode())
    for key, value in entries.items():
        body += encode_bytes(EXTERNAL, encode_bytes(KEY, key.encode()) + encode_bytes(VALUE, value.encode()))
    return encode_bytes(INITIALIZER, body)


def write(tmp_path: Path, tensors: list[bytes], data: bytes) -> tuple[Path, Path]:
    model, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    graph = encode_bytes(1, b"a node") + b"".join(tensors) + encode_bytes(2, b"a name")
    model.write_bytes(PRODUCER + encode_bytes(GRAPH, graph))
    weights.write_bytes(data)
    return model, weights


def entries_of(model: Path) -> dict[str, dict[str, str]]:
    found = {}
    (graph,) = (field.content for field in read_fields(memoryview(model.read_bytes())) if field.number == GRAPH)
    assert graph is not None
    for initializer in (field.content for field in read_fields(graph) if field.number == INITIALIZER):
        assert initializer is not None
        name, entries = "", {}
        for field in read_fields(initializer):
            if field.number == NAME and field.content is not None:
                name = bytes(field.content).decode()
            if field.number == EXTERNAL and field.content is not None:
                key, value = (bytes(part.content or b"").decode() for part in read_fields(field.content))
                entries[key] = value
        found[name] = entries
    return found


def region(data: bytes, offset: str, length: str) -> bytes:
    return data[int(offset) : int(offset) + int(length)]


def test_regions_move_to_aligned_offsets_with_their_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    tensors = [
        tensor("a", {"location": "w", "offset": "0", "length": "100", "prepacked_0": "MatMulNBits+1|100;70;0"}),
        tensor(
            "b", {"location": "w", "offset": "170", "length": "30", "prepacked_0": "MatMulNBits+2|200;10;5|210;6;7"}
        ),
        tensor("page", {"location": "w", "offset": "4096", "length": "5000"}),
        tensor("inside", {}),
    ]
    model, weights = write(tmp_path, tensors, data)
    assert align_external_data(model, weights) == 4
    moved, entries = weights.read_bytes(), entries_of(model)
    assert region(moved, entries["a"]["offset"], "100") == data[:100]
    assert region(moved, entries["b"]["offset"], "30") == data[170:200]
    assert entries["page"] == {"location": "w", "offset": "4096", "length": "5000"}
    assert region(moved, "4096", "5000") == data[4096:9096]
    assert entries["inside"] == {}
    name, first, second = entries["b"]["prepacked_0"].split("|")
    assert name == "MatMulNBits+2"
    for part, content, checksum in ((first, data[200:210], "5"), (second, data[210:216], "7")):
        offset, length, kept = part.split(";")
        assert (region(moved, offset, length), kept) == (content, checksum)
        assert int(offset) % 64 == 0


def test_a_page_aligned_region_stays_page_aligned(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    tensors = [
        tensor("a", {"offset": "0", "length": "10"}),
        tensor("b", {"offset": "10", "length": "4086"}),
        tensor("page", {"offset": "4096", "length": "9000"}),
    ]
    model, weights = write(tmp_path, tensors, data)
    align_external_data(model, weights)
    entries = entries_of(model)
    assert [entries[name]["offset"] for name in ("a", "b", "page")] == ["0", "64", "8192"]
    assert region(weights.read_bytes(), "8192", "9000") == data[4096:13096]


def test_large_overlapping_moves_keep_every_byte(tmp_path: Path) -> None:
    data = b"x" + bytes(index * 7 % 251 for index in range(3 * 1024 * 1024))
    tensors = [tensor("a", {"offset": "0", "length": "1"}), tensor("b", {"offset": "1", "length": str(len(data) - 1)})]
    model, weights = write(tmp_path, tensors, data)
    align_external_data(model, weights)
    assert weights.read_bytes()[64:] == data[1:]


def test_the_rest_of_the_model_stays(tmp_path: Path) -> None:
    model, weights = write(tmp_path, [tensor("a", {"offset": "0", "length": "4"})], b"abcd")
    before = model.read_bytes()
    assert align_external_data(model, weights) == 0
    assert model.read_bytes() == before


def test_shared_regions_move_together(tmp_path: Path) -> None:
    shared = {"offset": "3", "length": "4"}
    model, weights = write(tmp_path, [tensor("a", shared), tensor("b", shared)], b"...abcd")
    assert align_external_data(model, weights) == 1
    assert entries_of(model)["a"] == entries_of(model)["b"] == {"offset": "64", "length": "4"}


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "2", "length": "9"},
        {"offset": "x", "length": "9"},
        {"offset": "70"},
        {"offset": "70", "length": "1", "prepacked_0": "name|nonsense"},
    ],
    ids=["overlap", "no number", "no length", "bad part"],
)
def test_what_is_not_understood_is_left_alone(tmp_path: Path, entries: dict[str, str]) -> None:
    tensors = [tensor("a", {"offset": "0", "length": "4"}), tensor("b", entries)]
    model, weights = write(tmp_path, tensors, bytes(80))
    before = model.read_bytes()
    with pytest.raises(EngineError):
        align_external_data(model, weights)
    assert (model.read_bytes(), weights.read_bytes()) == (before, bytes(80))
