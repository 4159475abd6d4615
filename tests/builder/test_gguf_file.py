"""Hostile and damaged GGUF files: each fault has an error that names the file and the place."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import BuildError, CheckpointError, UnsupportedModelError
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.gguf_file import read_gguf
from support.gguf_files import write_gguf

UINT32, STRING, ARRAY, FLOAT32 = 4, 8, 9, 6
HUGE = 2**62


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(shape))
    return head + b"".join(struct.pack("<Q", extent) for extent in shape) + struct.pack("<IQ", kind, offset)


def file(
    *parts: bytes,
    version: int = 3,
    tensors: int = 0,
    fields: int = 0,
    data: int = 0,
    magic: bytes = b"GGUF",
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data)


CASES: dict[str, tuple[bytes, type[BuildError], str]] = {
    "other kind of file": (file(magic=b"GGML"), CheckpointError, "not a GGUF file"),
    "empty": (b"", CheckpointError, "not a GGUF file"),
    "first version": (file(version=1), UnsupportedModelError, "the GGUF file is of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3), UnsupportedModelError, "the GGUF file is big-endian"),
    "ends in the counts": (b"GGUF" + struct.pack("<IQ", 3, 0), CheckpointError, "the file ends inside the header"),
    "invented tensors": (file(tensors=HUGE), CheckpointError, f"should have {HUGE} tensors, but only"),
    "invented fields": (file(fields=HUGE), CheckpointError, f"should have {HUGE} metadata fields, but only"),
    "invented values": (
        file(field("a.b", ARRAY, struct.pack("<IQ", UINT32, HUGE)), fields=1),
        CheckpointError,
        f"should have {HUGE} values in the metadata field a.b",
    ),
    "invented texts": (
        file(field("a.b", ARRAY, struct.pack("<IQ", STRING, HUGE)), fields=1),
        CheckpointError,
        f"should have {HUGE} texts in the metadata field a.b",
    ),
    "invented text": (
        file(text("a.b") + struct.pack("<IQ", STRING, HUGE), fields=1),
        CheckpointError,
        f"a text in the metadata field a.b should have {HUGE} bytes",
    ),
    "text behind the end": (
        file(text("a.b") + struct.pack("<IQ", STRING, 4000), fields=1),
        CheckpointError,
        "the file ends inside the metadata field a.b",
    ),
    "unknown type": (file(field("a.b", 13, bytes(8)), fields=1), CheckpointError, "a.b is of the unknown type 13"),
    "array of arrays": (
        file(field("a.b", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12)), fields=1),
        CheckpointError,
        "a.b is an array of the unknown type 9",
    ),
    "text that is none": (file(field("a.b", STRING, text(b"\xff")), fields=1), CheckpointError, "a.b is not UTF-8"),
    "field twice": (
        file(*[field("a.b", UINT32, bytes(4))] * 2, fields=2),
        CheckpointError,
        "the metadata field a.b is there twice",
    ),
    "alignment": (
        file(field("general.alignment", UINT32, bytes(4)), fields=1),
        CheckpointError,
        "general.alignment is 0",
    ),
    "no dimensions": (file(tensor(shape=()), tensors=1), CheckpointError, "tensor x has 0 dimensions"),
    "five dimensions": (file(tensor(shape=(1,) * 5), tensors=1), CheckpointError, "tensor x has 5 dimensions"),
    "no elements": (file(tensor(shape=(32, 0)), tensors=1), CheckpointError, r"tensor x has shape \[0, 32\]"),
    "unknown kind": (file(tensor(kind=99), tensors=1), UnsupportedModelError, "tensor x is of the unknown kind 99"),
    "half a block": (file(tensor(shape=(33,), kind=2), tensors=1), CheckpointError, "rows of Q4_0 are blocks of 32"),
    "behind the end": (
        file(tensor(offset=HUGE), tensors=1, data=128),
        CheckpointError,
        f"ends inside tensor x.*end at {HUGE + 192}",
    ),
    "larger than the file": (
        file(tensor(shape=(HUGE, HUGE)), tensors=1, data=128),
        CheckpointError,
        "the file ends inside tensor x",
    ),
    "crooked offset": (file(tensor(offset=4), tensors=1, data=256), CheckpointError, "tensor x is at 4, no multiple"),
    "tensor twice": (file(tensor(), tensor(), tensors=2, data=256), CheckpointError, "tensor x is there twice"),
}


@pytest.mark.parametrize("case", CASES)
def test_file_that_cannot_be_is_refused(tmp_path: Path, case: str) -> None:
    data, error, match = CASES[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(error, match=match) as caught:
        read_gguf(tmp_path / "x.gguf")
    assert "x.gguf" in caught.value.message


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -3)
    writer.add_uint16("c", 60000)
    writer.add_int16("d", -300)
    writer.add_uint32("e", 4_000_000_000)
    writer.add_int32("f", -70000)
    writer.add_uint64("g", 2**63)
    writer.add_int64("h", -(2**40))
    writer.add_float32("i", 1e-5)
    writer.add_float64("j", 0.1)
    writer.add_bool("k", True)
    writer.add_string("l", "漢字")
    writer.add_array("m", [1, 2, 3])
    writer.add_array("n", ["x", ""])
    writer.add_array("o", [0.5, -1.5])
    writer.add_array("p", [True, False])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("t", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x.gguf")
    assert found.metadata.values == {
        "general.architecture": "test",
        "a": 200,
        "b": -3,
        "c": 60000,
        "d": -300,
        "e": 4_000_000_000,
        "f": -70000,
        "g": 2**63,
        "h": -(2**40),
        "i": 1e-5,
        "j": 0.1,
        "k": True,
        "l": "漢字",
        "m": [1, 2, 3],
        "n": ["x", ""],
        "o": [0.5, -1.5],
        "p": [True, False],
    }
    place = found.tensors["t"]
    assert (place.shape, place.length) == ((2, 32), values.nbytes)
    assert (tmp_path / "x.gguf").read_bytes()[place.offset :][: place.length] == values.tobytes()


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    kind = gguf.GGMLQuantizationType.Q4_0
    return write_gguf(path, HuggingFaceCheckpoint(tiny_checkpoint), kind=kind)


def cut(data: bytes, position: int, _value: int) -> bytes:
    return data[:position]


def flip(data: bytes, position: int, value: int) -> bytes:
    return data[:position] + bytes([data[position] ^ (value % 255 + 1)]) + data[position + 1 :]


def overwrite(data: bytes, position: int, value: int) -> bytes:
    return data[:position] + struct.pack("<Q", value) + data[position + 8 :]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.sampled_from([cut, flip, overwrite]),
    share=st.floats(0, 0.999),
    value=st.one_of(st.integers(0, 300), st.sampled_from([HUGE, 2**32, 2**64 - 1])),
)
def test_damaged_file_is_read_or_refused_and_never_takes_much_memory(
    small: Path, tmp_path: Path, damage: Callable[[bytes, int, int], bytes], share: float, value: int
) -> None:
    """Most faults go to the header, which is a twentieth of the file."""
    data = small.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(data, int(len(data) * share**3), value))
    tracemalloc.start()
    message = "x.gguf"
    try:
        checkpoint = GgufCheckpoint(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        checkpoint.tokenizer()
    except BuildError as error:
        message = error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "x.gguf" in message
    assert peak < 64 * 1024 * 1024
