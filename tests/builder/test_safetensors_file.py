"""Damaged safetensors headers end in an error that names the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.safetensors_file import read_safetensors_header, read_tensor


def write(path: Path, header: object, data: int = 64) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"{", "header is damaged"),
        (b"[]", "header is damaged"),
        (b'{"x": "\xff"}', "header is damaged"),
        ({"x": {}}, "header is damaged"),
        ({"x": entry(shape=[4, -4])}, "impossible offsets or extents"),
        ({"x": entry(shape=[2**62, 2**62])}, "tensor x of shape"),
        ({"x": entry(shape=[2**70])}, "header is damaged|tensor x of shape"),
        ({"x": entry(data_offsets=[64, 0])}, "impossible offsets or extents"),
        ({"x": entry(data_offsets=[-64, 0])}, "impossible offsets or extents"),
        ({"x": entry(data_offsets=[0, 2**62])}, "tensor x should end at"),
        ({"x": entry(data_offsets=[0, 60])}, "tensor x of shape"),
        ({"x": entry(shape=[4, 5])}, "tensor x of shape"),
        ({"x": entry(shape="4")}, "header is damaged"),
    ],
)
def test_header_that_cannot_be_is_refused(tmp_path: Path, header: object, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_safetensors_header(write(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in caught.value.message


def test_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(100))
    with pytest.raises(CheckpointError, match="108 bytes, but its header alone should have"):
        read_safetensors_header(tmp_path / "x.safetensors")


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=4), st.floats())
JSON = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, max_size=2))
def test_any_header_is_read_or_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = write(tmp_path / "x.safetensors", {"x": entry(**changes)})
    message = "x.safetensors"
    try:
        for name, stored in read_safetensors_header(path).items():
            assert read_tensor(name, stored).shape == stored.info.shape
    except CheckpointError as error:
        message = error.message
    assert "x.safetensors" in message
